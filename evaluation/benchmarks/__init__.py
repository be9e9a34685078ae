"""This package holds benchmarks: each module is called after its script, `scripts/benchmark_<name>.py`, and its record,
`docs/benchmarks/<name>.json`; the page of a record is `<name>_report` where it has a file of its own."""
