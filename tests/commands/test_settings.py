"""Settings given on the command line arrive typed; mistakes are refused with their full key."""

import json

import pytest

from configs.command import parse
from configs.earlier import translated
from moc import MoCConfig
from moc.earlier import SAMPLER
from moc.errors import UserError
from models.encoders.pair import read_encoders
from tests.composing import REQUIRED, composed, parsed, schema_of


def test_parsed_configs_are_plain_and_frozen():
    config = parsed("train", "schedule=[{step: 0, chunk_tokens: 40, top_k: 3}]", "optim.lr=1e-3")
    assert type(config.optim.betas) is list
    assert (config.optim.lr, config.schedule[0].chunk_tokens) == (1e-3, 40)
    with pytest.raises(AttributeError):
        config.optim.lr = 2.0
    assert config.model.family == "mmdit"


def test_settings_that_may_be_absent_are_typed_where_they_are_set():
    assert parsed("convert").encoders is None
    paths = REQUIRED["encoders=holocine"]
    encoders = parsed("convert", "encoders=holocine", *paths).encoders
    assert (encoders.codec.continuous, encoders.text.form) == (True, "holocine")
    for override, message in (("encoders.codec.tiling=1.5", "tiling"), ("+encoders.codec.new=1", "encoders.codec.new")):
        with pytest.raises(UserError, match=message):
            parsed("convert", "encoders=holocine", *paths, override)


def test_what_is_the_checkpoints_is_null():
    sample, convert = parsed("sample"), parsed("convert")
    assert sample.low_noise_checkpoint is None
    assert {sample.shift, sample.encoders_path, convert.shift, convert.encoders_path} == {None}
    assert parsed("sample", "shift=null", "encoders_path=null") == sample
    assert parsed("sample", "shift=5").shift == 5


def test_what_is_not_set_is_null_and_files_that_said_so_otherwise_are_read_so():
    prepare, train, demo = parsed("prepare"), parsed("train"), parsed("demo")
    assert {prepare.fps, prepare.threshold, prepare.captioner, parsed("storyworld").workers} == {None}
    assert {train.model.path, train.data.local_cache, train.parallel.replicate} == {None}
    assert {demo.scenes, demo.steps, demo.workers, parsed("evaluate").page, parsed("benchmark_recall").start} == {None}
    assert parsed("train", "model.path=null", "parallel.replicate=null") == train
    earlier = {
        "encoders.codec.path": "",
        "encoders.text.path": "",
        "model.path": "",
        "data.path": "",
        "data.local_cache": "",
        "parallel.replicate": 0,
        "model.cut_gap": 0.0,
        "moc.top_k": 0,
    }
    assert translated(earlier) == dict.fromkeys(earlier) | {"moc.top_k": 0}


@pytest.mark.parametrize(
    ("command", "key"),
    [
        *(("sample", "lora"), ("sample", "encoders_path"), ("evaluate", "page"), ("prepare", "captioner")),
        *(("train", "model.path"), ("train", "data.path"), ("train", "data.local_cache")),
        *(("prepare", "encoders.codec.path"), ("prepare", "encoders.text.path")),
    ],
)
def test_a_text_of_nothing_is_no_unset_setting(command, key):
    """A shell gives such a text for a variable that it does not have."""
    with pytest.raises(UserError, match=f"^{key} is empty"):
        parsed(command, f"{key}=")


@pytest.mark.parametrize(
    ("command", "setting", "said"),
    [
        ("sample", "sampler.context_shots=0", "must be finite and at least 1; null is all"),
        ("sample", "sampler.high_noise_guidance_scale=0", "must be finite and above 0; null is sampler.guidance_scale"),
        ("train", "parallel.replicate=0", "must be finite and at least 1; null is as often as"),
        ("prepare", "fps=0", "must be finite and above 0; null is each video's own"),
        ("prepare", "threshold=0", "must be finite and above 0; null is the detector's own"),
        ("demo", "scenes=0", "must be finite and at least 1; null is the scale's"),
        ("demo", "steps=0", "must be finite and at least 1; null is the scale's"),
        ("demo", "workers=0", "must be finite and at least 1; null is one a core"),
        ("storyworld", "workers=0", "must be at least 1, or null for one a core"),
        ("benchmark_memory", "limit_gib=0", "must be finite and above 0; null is all of it"),
    ],
)
def test_nothing_is_no_word_for_an_unset_setting(command, setting, said):
    """Earlier versions wrote some of these where nothing was set, and 0 would silently mean all."""
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"{key}=0(\.0)?:? {said}"):
        parsed(command, setting)


def test_samplers_and_encoders_of_earlier_versions_are_read_with_nulls(tmp_path):
    assert SAMPLER.translated({"context_shots": 0, "steps": 0}) == {"context_shots": None, "steps": 0}
    record = {"codec": {"kind": "lapped", "path": ""}, "text": {"kind": "t5", "path": ""}}
    (tmp_path / "encoders.json").write_text(json.dumps(record))
    encoders = read_encoders(tmp_path)
    assert (encoders.codec.path, encoders.text.path) == (None, None)


def test_the_seed_of_a_run_is_that_of_its_data():
    assert parsed("train", "seed=7").data.seed == 7


SEEDS = [
    *(("train", "seed"), ("sample", "sampler.seed"), ("app", "sampler.seed"), ("evaluate", "seed"), ("demo", "seed")),
    *(("draw_recall", "seed"), ("benchmark_recall", "seed"), ("benchmark_film", "seed"), ("train", "data.seed")),
]


@pytest.mark.parametrize(("command", "key"), SEEDS, ids=[" ".join(case) for case in SEEDS])
def test_a_seed_is_a_32_bit_word(command, key):
    """Draws hash a seed's low 32 bits: 2**32 would draw as 0 does."""
    parsed(command, f"{key}={2**32 - 1}")
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed={seed} must be a whole number from 0 to 4294967295"):
            parsed(command, f"{key}={seed}")


def test_a_progressive_schedule_is_given_on_the_command_line():
    override = "schedule=[{step: 0, chunk_tokens: 10240, top_k: 5}, {step: 5000, chunk_tokens: 1280, top_k: 5}]"
    assert [stage.chunk_tokens for stage in parsed("train", override).schedule] == [10240, 1280]
    (stage,) = parsed("train", "schedule=[{step: 9, drop_off_max: 0, drop_in_rate: 0.1}]").schedule
    assert (stage.step, stage.top_k, stage.drop_off_max, stage.drop_in_rate) == (9, None, 0.0, 0.1)


def test_any_optimizer_is_named_with_its_arguments():
    rates = 'optim.rates=[{match: "*.to_qkv.*"}, {match: "*", factor: 0}]'
    optim = parsed("train", "optim.name=torch.optim.SGD", "+optim.args.momentum=0.9", rates).optim
    assert (optim.name, optim.args) == ("torch.optim.SGD", {"momentum": 0.9})
    assert [(rate.match, rate.factor) for rate in optim.rates] == [("*.to_qkv.*", 1.0), ("*", 0.0)]


MISTAKES = [
    ("train", "+trainer.num_step=5", r"trainer\.num_step"),
    ("train", "+model.depth=5", r"model\.depth"),
    ("train", "+colour=red", "colour"),
    ("train", "trainer.num_steps=many", r"^trainer\.num_steps='many' must be a whole number$"),
    ("train", "optim.lr=fast", r"^optim\.lr='fast' must be a number$"),
    ("train", "moc.causal=perhaps", r"^moc\.causal='perhaps' must be true or false$"),
    ("train", "model.family=unet", r"^model\.family='unet' is not one of mmdit, wan$"),
    ("train", "optim.lr=null", r"^optim\.lr=null must have a value; say optim\.lr=VALUE, or leave it out"),
    ("train", "seed=null", "^seed=null must have a value"),
    ("train", "optim.betas=null", r"^optim\.betas=null must have a value"),
    ("train", "data.batch_tokens=null", r"^data\.batch_tokens=null must have a value"),
    ("train", "optim.betas=[0.9]", r"optim\.betas"),
    ("train", "optim.name=sgd", r"optim\.name='sgd' is not one of adamw"),
    ("train", "optim.rates=[{match: a, factor: -1}]", r"optim\.rates\.factor=-1"),
    ("train", "optim.rates=[{pattern: a}]", r"optim\.rates|pattern"),
    ("train", "flow.dense_target=2", r"flow\.dense_target=2"),
    ("train", "schedule=[{step: 5, drop_off_max: 2}]", r"drop_off_max=2"),
    ("train", "optim.betas=[0.9,big]", r"^optim\.betas\[1\]='big' must be a number$"),
    ("train", "schedule=[{step: 0, chunk_tokens: x, top_k: 1}]", r"schedule\[0\]\.chunk_tokens"),
    ("train", "schedule=[{step: 0, chunks: 4}]", r"schedule\[0\]\.chunks"),
    ("train", "schedule=[{step: 5, chunk_tokens: 0, top_k: 1}]", "chunk_tokens=0"),
    ("train", "moc.own_anchor=scene", r"moc\.own_anchor.*'scene'.*shot, chunk, none"),
    ("train", "trainer.log_every=0", r"trainer\.log_every=0"),
    ("train", "trainer.checkpoint_every=-1", r"trainer\.checkpoint_every=-1 must be finite and at least 0"),
    ("train", "optim.warmup_steps=-1", r"optim\.warmup_steps=-1"),
    ("train", "optim.weight_decay=-0.1", r"optim\.weight_decay=-0\.1"),
    ("train", "optim.lr=nan", r"optim\.lr=nan"),
    ("train", "optim.betas=[0.9,1]", r"optim\.betas=.*in \[0, 1\)"),
    ("train", "data.prefetch=0", r"data\.prefetch=0 must be finite and at least 1"),
    ("train", "data.sources=[{path: a, weight: 0}]", r"data\.sources.* weight 0\.0 of a"),
    ("train", "data={path: a, sources: [{path: b}]}", r"^data\.path and data\.sources are set together; set one"),
    ("train", "data={path: a, recall: {}}", r"^data\.path and data\.recall are set together; set one"),
    ("train", "data={recall: {}, drop_to_still: 0, held_out: [a]}", r"^data\.held_out=\['a'\] names prepared scenes"),
    ("train", "trainer.ema_decay=1.5", r"trainer\.ema_decay=1\.5"),
    ("train", "flow.logit_mean=nan", r"flow\.logit_mean=nan"),
    ("prepare", "fps=nan", "fps=nan must be finite"),
    ("prepare", "threshold=-1", r"threshold=-1\.0"),
    ("prepare", "encoders.text.num_layers=0", r"text\.num_layers=0"),
    ("convert", "max_shard_gb=nan", "max_shard_gb=nan"),
    ("demo", "scenes=-1", "scenes=-1"),
    ("benchmark_data", "steps=0", "steps=0"),
    ("train", "model.num_heads=0", r"model\.num_heads=0"),
    ("train", "model.num_layers=0", r"model\.num_layers=0"),
    ("train", "name=", "name is empty"),
    ("train", "name='  '", "name is empty"),
    ("train", "schedule=[1,2]", r"schedule\[0\] is 1; it must be a mapping"),
    ("train", "data.path=${nowhere}", r"data\.path: .*nowhere"),
    ("train", "flow.shift=0", r"flow\.shift=0"),
    ("train", "flow.shift=nan", r"flow\.shift=nan"),
    ("train", "flow.logit_std=inf", r"flow\.logit_std=inf"),
    ("train", "parallel.precision=fp8", r"precision='fp8' is not one of"),
    ("train", "parallel.sequence=0", r"parallel\.sequence=0"),
    ("benchmark_parallel", "meshes=[tensor]", r"meshes=.*one, data, shard, sequence"),
    ("train", "model=wan", r"model\.path"),
    ("sample", "sampler.steps=0", r"sampler\.steps=0"),
    ("sample", "+sampler.cfg=3", r"sampler\.cfg"),
    ("sample", "script=", "script is not set"),
    ("sample", "shift=none", r"shift.*'none'"),
    ("prepare", "size=[480]", "size"),
    ("prepare", "encoders.codec.path=vae", "codec.path=vae is of the kind wan"),
    ("evaluate", "films=film", r"^films is a list; say films=\[...\]$"),
    ("prepare", "decoder=gpu", "decoder must be one of"),
    ("storyworld", "mode=strange", "mode"),
]


@pytest.mark.parametrize(("name", "override", "message"), MISTAKES, ids=[f"{m[0]} {m[1]}" for m in MISTAKES])
def test_mistakes_are_refused_with_their_key(name, override, message):
    with pytest.raises(UserError, match=message) as error:
        parsed(name, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "sample",
            [],
            "checkpoint, script and out are not set; say checkpoint=VALUE script=VALUE out=VALUE. checkpoint: ",
        ),
        ("sample", ["script=", "out=null", "checkpoint=c"], "script and out are not set; say script=VALUE out=VALUE. "),
        ("storyworld", ["output=???"], "output is not set; say output=VALUE. output: "),
        (
            "convert",
            ["encoders=wan"],
            "encoders.codec.path, encoders.text.path and input are not set; say encoders",
        ),
        ("train", ["model=wan", "encoders=wan", "encoders.text.path=t"], "model.path and encoders.codec.path are not"),
        (
            "train",
            ["data.sources=[{path: a}, {weight: 2}]"],
            "data.sources[1].path is not set; say data.sources=[",
        ),
        ("train", ["data.sources=[{path: ''}]"], "data.sources[0].path is not set"),
        ("evaluate", ["checkpoint="], "checkpoint is empty; say checkpoint=VALUE, or leave it out"),
    ],
)
def test_all_that_must_be_given_is_named_at_once(name, overrides, message):
    with pytest.raises(UserError) as error:
        parse(composed(name, *overrides), schema_of(name))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_path_that_begins_with_a_tilde_lies_in_the_users_home(monkeypatch):
    """zsh and dash hand over `out=~/film` as it is typed."""
    monkeypatch.setenv("HOME", "/home/ann")
    config = parsed("sample", "out='~/film'", "script='b~/c'", "lora=[{path: '~/a'}]")
    assert (config.out, config.script) == ("/home/ann/film", "b~/c")
    assert config.lora[0]["path"] == "/home/ann/a"


@pytest.mark.parametrize("name", ["sample", "evaluate", "convert"])
def test_every_command_sets_attention_in_the_words_of_training(name):
    trained = MoCConfig(top_k=2, causal=False)
    assert trained.override(parsed(name).moc) == trained
    assert trained.override(parsed(name, "moc.top_k=3").moc) == MoCConfig(top_k=3, causal=False)
    assert (
        trained.override(parsed(name, "moc=forward", "moc.top_k=3").moc)
        == parsed("train", "moc=forward", "moc.top_k=3").moc
    )
    with pytest.raises(UserError, match="unknown MoC settings"):
        trained.override(parsed(name, "+moc.top=3").moc)
