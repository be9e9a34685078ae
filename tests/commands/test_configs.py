"""Every configuration composes and parses; every setting can be set; mistakes are refused with their full key."""

import importlib
import re
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from configs.command import defaults, parse, store_defaults
from configs.words import words
from data.cache.writer import EncodedScene
from data.loading.dataset import open_dataset
from data.loading.loader import build_loader, held_out
from film.script import load_script
from moc import MoCConfig, Shot, ShotLayout, StreamSpec
from moc.errors import UserError
from moc.schedule import MoCSchedule
from models import build_model
from tests.caches import scene, write_cache

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
GROUPS = sorted(
    path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name not in ("scripts", "__pycache__")
)
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
OWNERS = {"moc": "train", "encoders": "prepare"}  # the command whose schema has the group's type
# What a command cannot do without.
REQUIRED = {
    "sample": ["checkpoint=c", "script=s", "out=o"],
    "app": ["checkpoint=c", "folder=f"],
    "prepare": ["input=i", "output=o"],
    "storyworld": ["output=o"],
    "example_film": ["output=o"],
    "convert": ["input=i", "output=o"],
    "benchmark_data": ["folder=f"],
    "benchmark_film": ["film=f"],
    "model=wan": ["model.path=p"],
    "encoders=wan": ["encoders.codec.path=p", "encoders.text.path=p"],
    "encoders=holocine": ["encoders.codec.path=p", "encoders.text.path=p"],
}


def commands() -> dict[str, tuple[str, str]]:
    """Config name -> (module, schema) of every `command(...)` in the checkout."""
    found = {}
    for path in [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "scripts").glob("*.py"))]:
        for name, schema in re.findall(r'\bcommand\("(\w+)", (\w+)\)', path.read_text()):
            found[name] = (".".join(path.relative_to(ROOT).with_suffix("").parts), schema)
    return found


COMMANDS = commands()


def schema_of(name: str) -> type:
    module, schema = COMMANDS[name]
    return getattr(importlib.import_module(module), schema)


def composed(name: str, *overrides: str) -> DictConfig:
    store_defaults(name, schema_of(name))
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose(name, list(overrides))


def parsed(name: str, *overrides: str):
    return parse(composed(name, *REQUIRED.get(name, []), *overrides), schema_of(name))


def test_every_command_has_its_yaml_and_every_yaml_its_command():
    assert sorted(COMMANDS) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert {"train", "sample", "prepare", "storyworld"} <= set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_composes_and_parses(name):
    assert isinstance(parsed(name), schema_of(name))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_leave_no_log_file_behind(name):
    store_defaults(name, schema_of(name))
    with initialize_config_dir(str(CONFIGS), version_base=None):
        hydra = compose(name, return_hydra_config=True).hydra
    assert not (hydra.job_logging.get("handlers") or {}).get("file")
    assert (hydra.run.dir, hydra.output_subdir) == (".", None)


def users_of(group: str) -> list[str]:
    pattern = re.compile(rf"^  - {group}: ", re.MULTILINE)
    return [name for name in COMMANDS if pattern.search((CONFIGS / f"{name}.yaml").read_text())]


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_belongs_to_a_command(group):
    assert users_of(group)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_parses(group, option):
    choice = f"{group}={option}"
    for name in users_of(group):
        assert isinstance(parsed(name, choice, *REQUIRED.get(choice, [])), schema_of(name))


def settings(schema: type, prefix: str = "") -> set[str]:
    """The full keys of every setting of a schema."""
    hints, keys = get_type_hints(schema), set()
    for field in fields(schema):
        nested = hints[field.name]
        keys |= settings(nested, f"{prefix}{field.name}.") if is_dataclass(nested) else {prefix + field.name}
    return keys


def values(cfg: DictConfig, schema: type, prefix: str = "") -> set[str]:
    hints, keys = get_type_hints(schema), set()
    for name in cfg:
        nested = hints[name]
        keys |= values(cfg[name], nested, f"{prefix}{name}.") if is_dataclass(nested) else {prefix + name}
    return keys


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_setting_can_be_seen_in_the_help(name):
    """A setting without a value in YAML could not be set as `key=value`, and `--help` would not show it."""
    schema = schema_of(name)
    assert values(composed(name, *REQUIRED.get(name, [])), schema) == settings(schema)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_has_words_on_every_setting(name):
    """A dataclass's docstring holds them, as "name: words." or "name, other: words."."""
    said = words(schema_of(name))
    assert said.keys() >= settings(schema_of(name))
    assert not [key for key, text in said.items() if len(text.split()) < 2]


def inherited(path: Path, schema: type) -> DictConfig:
    """What a YAML file's values are merged into: what its `defaults` name, in order."""
    merged = OmegaConf.create()
    for entry in OmegaConf.load(path).get("defaults", []):
        option, package = entry, None
        if OmegaConf.is_dict(entry):
            ((key, option),) = entry.items()
            package = key.removeprefix("override ").lstrip("/")
        if option in (None, "_self_", "none"):
            continue
        folder = path.parent if package is None else CONFIGS / package
        if str(option).endswith("schema"):
            values = OmegaConf.create(defaults(schema))
        else:
            values = whole(folder / f"{option}.yaml", schema if package is None else get_type_hints(schema)[package])
        merged = OmegaConf.merge(merged, {package: values} if package else values)
    return merged


def whole(path: Path, schema: type) -> DictConfig:
    own = OmegaConf.load(path)
    own.pop("defaults", None)
    return OmegaConf.merge(inherited(path, schema), own)


def leaves(cfg: DictConfig) -> dict[str, object]:
    """Dotted key -> value, interpolations as they are written."""

    def walk(values: dict, prefix: str = ""):
        for name, value in values.items():
            nested = isinstance(value, dict) and value
            yield from walk(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]

    return dict(walk(OmegaConf.to_container(cfg)))


def yaml_files() -> list:
    """(file, schema of its values) of every command, option and experiment."""
    found = [(CONFIGS / f"{name}.yaml", schema_of(name)) for name in sorted(COMMANDS)]
    for group, option in OPTIONS:
        command = schema_of(OWNERS.get(group) or users_of(group)[0])
        schema = command if group == "experiment" else get_type_hints(command)[group]
        found.append((CONFIGS / group / f"{option}.yaml", schema))
    return [pytest.param(*pair, id=f"{pair[0].parent.name}/{pair[0].stem}") for pair in found]


@pytest.mark.parametrize(("path", "schema"), yaml_files())
def test_a_default_stands_once(path, schema):
    """The dataclass has the default; a YAML file holds only what differs from what it builds on."""
    own = OmegaConf.load(path)
    own = leaves(OmegaConf.masked_copy(own, [key for key in own if key not in ("defaults", "hydra")]))
    before = leaves(inherited(path, schema))
    assert not {key: value for key, value in own.items() if key in before and before[key] == value}


@pytest.mark.parametrize("path", sorted((CONFIGS / "scripts").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_scripts_that_ship_are_good(path):
    script = load_script(path)
    assert len(script.shots) >= 4


@pytest.mark.parametrize("scale", ["small", "large"])
def test_the_demos_stages_are_commands_that_parse(tmp_path, scale):
    demo = importlib.import_module("scripts.demo")
    names = {"scripts/make_storyworld.py": "storyworld", "scripts/prepare_data.py": "prepare"}
    stages = demo.plan(parsed("demo", f"output={tmp_path}", f"scale={scale}"))
    assert len(stages) >= 4
    for stage in stages:
        script, *overrides = stage.arguments
        name = names.get(script, Path(script).stem)
        assert isinstance(parse(composed(name, *overrides), schema_of(name)), schema_of(name))


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


def test_the_seed_of_a_run_is_that_of_its_data():
    assert parsed("train", "seed=7").data.seed == 7


def test_some_shots_are_trained_on_as_stills(tmp_path):
    """As in LCT; the demo's training alone leaves it out."""
    cache = write_cache(tmp_path, [scene(number, shots=2, frames=3) for number in range(4)])
    for choice, rate in (("model=base", 0.1), ("experiment=wan_a14b_low", 0.1), ("experiment=storyworld", 0)):
        config = parsed("train", choice, f"data.path={cache}", "data.workers=0", "data.validation=0").data
        steps = islice(build_loader(config, StreamSpec(), chunk_tokens=6), 10)
        frames = [latent.shape[1] for step in steps for batch in step for latent in batch.latents]
        assert len(frames) > 300
        assert frames.count(1) / len(frames) == pytest.approx(rate, abs=0.03)


def test_scenes_of_any_size_are_evaluated(tmp_path):
    """One of them alone is more than a training step of the default size."""
    shape = (3, 9, 64, 64)
    scenes = [EncodedScene(str(n), str(n), "single", [torch.zeros(shape)], [[torch.zeros(1, 8)] * 2]) for n in range(2)]
    cache = write_cache(tmp_path, scenes)
    config = parsed("evaluate", f"data.path={cache}", "data.validation=1").data
    (batch,) = held_out(open_dataset(config), config.validation, StreamSpec(), chunk_tokens=6)
    assert batch.layout.num_tokens > parsed("train").data.batch_tokens


@pytest.mark.parametrize("name", ["wan", "holocine"])
def test_wans_configurations_take_the_releases_512_tokens(name):
    chosen = f"encoders={name}"
    assert parsed("prepare", chosen, *REQUIRED[chosen]).encoders.text.max_tokens == 512


EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_head_of_an_experiment_has_a_command_that_composes(path):
    head = path.read_text().split("defaults:")[0].replace("\\\n#", " ")
    commands = re.findall(r"train\.py (.+)", head)
    assert any(f"experiment={path.stem}" in command for command in commands)
    for command in commands:
        arguments = re.findall(r"[\w.]+=[^\s,;)]+", command)
        assert parsed("train", *arguments).name
    if path.stem.startswith(("wan", "single", "multi")):
        assert "ardware" in head
        assert "not measured" in head


def test_the_papers_models_have_the_papers_attention():
    single, multi = (parsed("train", f"experiment={name}", "data.path=p") for name in ("single_shot", "multi_shot"))
    assert (single.moc.chunk_tokens, single.moc.top_k, single.moc.causal) == (256, 3, False)
    assert str(single.moc.own_anchor) == "chunk"
    assert [MoCSchedule(multi.schedule).at(step, multi.moc).chunk_tokens for step in (0, 5000, 10_000, 15_000)] == [
        10240, 5120, 2560, 1280
    ]  # fmt: skip
    assert (multi.moc.top_k, multi.moc.causal, multi.optim.lr, multi.trainer.num_steps) == (5, True, 9e-5, 20_000)
    layout = ShotLayout.build([Shot(0, (25, 30, 30))] * 8)
    assert layout.num_tokens == 180_000


def test_the_two_experts_share_the_noise_levels():
    low, high = (parsed("train", f"experiment=wan_a14b_{name}") for name in ("low", "high"))
    levels = [low.flow.sigma_min, low.flow.sigma_max, high.flow.sigma_min, high.flow.sigma_max]
    assert levels == [0.0, 0.875, 0.875, 1.0]
    assert (low.model.path, low.model.lora_targets) == (f"{high.model.path}_2", high.model.lora_targets)


def test_a_progressive_schedule_is_given_on_the_command_line():
    override = "schedule=[{step: 0, chunk_tokens: 10240, top_k: 5}, {step: 5000, chunk_tokens: 1280, top_k: 5}]"
    assert [stage.chunk_tokens for stage in parsed("train", override).schedule] == [10240, 1280]
    (stage,) = parsed("train", "schedule=[{step: 9, drop_off_max: 0, drop_in_rate: 0.1}]").schedule
    assert (stage.step, stage.top_k, stage.drop_off_max, stage.drop_in_rate) == (9, None, 0.0, 0.1)


def test_any_optimizer_is_named_with_its_arguments():
    parts = 'optim.parts=[{match: "*.to_qkv.*"}, {match: "*", factor: 0}]'
    optim = parsed("train", "optim.name=torch.optim.SGD", "+optim.args.momentum=0.9", parts).optim
    assert (optim.name, optim.args) == ("torch.optim.SGD", {"momentum": 0.9})
    assert [(part.match, part.factor) for part in optim.parts] == [("*.to_qkv.*", 1.0), ("*", 0.0)]


@pytest.mark.parametrize(("size", "millions"), [("small", 15), ("base", 300), ("3b", 3000)])
def test_models_have_the_sizes_that_their_files_say(size, millions):
    """With the latents of Wan's VAE and the text features of UMT5."""
    config = parsed("train", f"model={size}").model
    with torch.device("meta"):
        model = build_model(config, latent_channels=16, text_dim=4096)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.1)


MISTAKES = [
    ("train", "+trainer.num_step=5", r"trainer\.num_step"),
    ("train", "+model.depth=5", r"model\.depth"),
    ("train", "+colour=red", "colour"),
    ("train", "trainer.num_steps=many", r"trainer\.num_steps.*'many'"),
    ("train", "optim.lr=fast", r"optim\.lr.*'fast'"),
    ("train", "moc.causal=perhaps", r"moc\.causal.*'perhaps'"),
    ("train", "model.family=unet", r"model\.family.*unet"),
    ("train", "optim.lr=null", r"optim\.lr"),
    ("train", "seed=null", "seed"),
    ("train", "data.path=null", r"data\.path"),
    ("train", "optim.betas=[0.9]", r"optim\.betas"),
    ("train", "optim.name=sgd", r"optim\.name='sgd' is not one of adamw"),
    ("train", "optim.parts=[{match: a, factor: -1}]", r"optim\.parts\.factor=-1"),
    ("train", "optim.parts=[{pattern: a}]", r"optim\.parts|pattern"),
    ("train", "flow.dense_target=2", r"flow\.dense_target=2"),
    ("train", "schedule=[{step: 5, drop_off_max: 2}]", r"drop_off_max=2"),
    ("train", "optim.betas=[0.9,big]", r"optim\.betas\[1\].*'big'"),
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
    ("prepare", "decoder=gpu", "decoder must be one of"),
    ("storyworld", "mode=strange", "mode"),
]


@pytest.mark.parametrize(("name", "override", "message"), MISTAKES, ids=[f"{m[0]} {m[1]}" for m in MISTAKES])
def test_mistakes_are_refused_with_their_key(name, override, message):
    with pytest.raises(UserError, match=message) as error:
        parsed(name, override)
    assert "\n" not in str(error.value)


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
