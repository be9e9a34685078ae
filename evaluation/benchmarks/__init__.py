"""This package holds benchmarks. The module of `scripts/benchmark_<name>.py` is called `<name>`, as its record in
docs/benchmarks is; `month` is that of plan_month.py, and `kernels_ahead` that of compile_kernels.py. The page of a
record is made by `<name>_report` where it has a file of its own.

measurements    keeps records, and says where rows were measured
timing          times work on a GPU
training_steps  takes the trainer's steps on films of random latents
trainings       trains the rows of a benchmark
"""
