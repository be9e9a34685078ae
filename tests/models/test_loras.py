"""These tests are about LoRAs of other makers: their names, their scales, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file
from torch import Tensor

from moc.errors import UserError
from models import load_denoiser, load_model
from models.checkpoints.loras import LoraChoice, read_choices
from models.checkpoints.names import to_original_name
from tests.models.test_lora import adapted, save_base

RANK = 2
LAYERS = ["blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj"]

UP, DOWN, ALPHA = (f"transformer.{LAYERS[0]}.{ending}" for ending in ("lora_B.weight", "lora_A.weight", "alpha"))


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    return save_base("wan", tmp_path / "base")


@pytest.fixture
def matrices(wan: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the down and the up matrix of each layer."""
    state = load_model(wan).state_dict()
    shapes = {layer: state[f"{layer}.weight"].shape for layer in LAYERS}
    return {layer: (torch.randn(RANK, columns), torch.randn(rows, RANK)) for layer, (rows, columns) in shapes.items()}


def original(layer: str) -> str:
    return (to_original_name(f"{layer}.weight") or "").removesuffix(".weight")


def in_form(form: str, matrices: dict[str, tuple[Tensor, Tensor]], alpha: float | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a file as a maker writes it."""
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in matrices.items():
        first, second, stem = {
            "diffusers": ("lora_A.weight", "lora_B.weight", f"transformer.{layer}"),
            "peft": ("lora_A.weight", "lora_B.weight", f"base_model.model.{layer}"),
            "diffsynth": ("lora_A.default.weight", "lora_B.default.weight", original(layer)),
            "comfyui": ("lora_down.weight", "lora_up.weight", f"diffusion_model.{original(layer)}"),
            "kohya": ("lora_down.weight", "lora_up.weight", f"lora_unet_{original(layer).replace('.', '_')}"),
        }[form]
        tensors |= {f"{stem}.{first}": down.clone(), f"{stem}.{second}": up.clone()}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def assert_added(base: Path, choices: list[LoraChoice], expected: dict[str, Tensor]) -> None:
    """The weights with LoRAs are those without, and what is expected; the others are as they were."""
    plain, merged = load_model(base).state_dict(), load_model(base, loras=choices).state_dict()
    assert plain.keys() == merged.keys()
    for name, weight in plain.items():
        if name in expected:
            torch.testing.assert_close(merged[name] - weight, expected[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(merged[name], weight)


@pytest.mark.parametrize("form", ["diffusers", "peft", "diffsynth", "comfyui", "kohya"])
def test_every_makers_names_are_read(form, wan, matrices, tmp_path):
    expected = {f"{layer}.weight": up @ down for layer, (down, up) in matrices.items()}
    save_file(in_form(form, matrices), tmp_path / "lora.safetensors")
    assert_added(wan, [LoraChoice(tmp_path / "lora.safetensors")], expected)


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_an_alpha_scales(form, wan, matrices, tmp_path):
    expected = {f"{layer}.weight": 0.25 * up @ down for layer, (down, up) in matrices.items()}
    tensors = in_form(form, matrices, alpha=0.5)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_added(wan, [LoraChoice(tmp_path / "lora.safetensors")], expected)
    if form == "comfyui":  # diffusers converts kohya's names for whole models only
        converted = WanPipeline.lora_state_dict(tensors)
        for layer in LAYERS:
            up, down = (converted[f"transformer.{layer}.lora_{letter}.weight"] for letter in "BA")
            torch.testing.assert_close(up @ down, expected[f"{layer}.weight"])


def test_several_are_added_by_their_weights(wan, matrices, tmp_path):
    first = dict(list(matrices.items())[:2])
    save_file(in_form("kohya", first, alpha=1.0), tmp_path / "a.safetensors")
    save_file(in_form("peft", matrices), tmp_path / "b.safetensors")
    expected = {f"{layer}.weight": -0.5 * up @ down for layer, (down, up) in matrices.items()}
    for layer, (down, up) in first.items():
        expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + 0.8 * 0.5 * up @ down
    setting = [
        {"path": str(tmp_path / "a.safetensors"), "weight": 0.8},
        {"path": str(tmp_path / "b.safetensors"), "weight": -0.5},
    ]
    assert_added(wan, list(read_choices(setting)), expected)


def test_settings_beside_a_file_and_in_its_header_scale(wan, matrices, tmp_path):
    """peft says it in adapter_config.json, diffusers in lora_adapter_metadata."""
    expected = {f"{layer}.weight": 4 * up @ down for layer, (down, up) in matrices.items()}
    (tmp_path / "peft").mkdir()
    save_file(in_form("peft", matrices), tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    assert_added(wan, [LoraChoice(tmp_path / "peft")], expected)
    settings = {"r": 2, "lora_alpha": 4 * math.sqrt(2), "use_rslora": True}  # divided by the root of the rank
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(settings))
    assert_added(wan, [LoraChoice(tmp_path / "peft")], expected)
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})}
    save_file(in_form("diffusers", matrices), tmp_path / "lora.safetensors", header)
    assert_added(wan, [LoraChoice(tmp_path / "lora.safetensors")], expected)
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}))
    with pytest.raises(UserError, match="alpha_pattern"):
        load_model(wan, loras=[LoraChoice(tmp_path / "peft")])
    refusals = {"{": "'{' is no JSON object", "[]": "no JSON object", '{"lora_alpha": "8"}': "must be a number"}
    for said, message in refusals.items():
        save_file(in_form("diffusers", matrices), tmp_path / "lora.safetensors", {"lora_adapter_metadata": said})
        with pytest.raises(UserError, match=message):
            load_model(wan, loras=[LoraChoice(tmp_path / "lora.safetensors")])


def test_whole_differences_are_added(wan, tmp_path):
    """Files of distilled models hold such differences of norms' weights and of biases."""
    state = load_model(wan).state_dict()
    names = {"blocks.0.attn1.norm_q.weight": "diff", "blocks.1.ffn.net.2.bias": "diff_b"}
    added = {name: torch.randn_like(state[name]) for name in names}
    tensors = {f"diffusion_model.{original(n.rpartition('.')[0])}.{kind}": added[n] for n, kind in names.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_added(wan, [LoraChoice(tmp_path / "lora.safetensors", 0.5)], {n: 0.5 * x for n, x in added.items()})


def test_an_adapter_of_ours_is_one_too(wan, tmp_path):
    tuned = adapted(wan, ["to_q", "net.2"])
    tuned.save_pretrained(tmp_path / "tuned")
    merged, chosen = load_model(tmp_path / "tuned"), load_model(wan, loras=[LoraChoice(tmp_path / "tuned")])
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(chosen.state_dict()[name], weight)


def test_experts_have_their_own(wan, matrices, tmp_path):
    """One file may have LoRAs of both; low_noise_lora is of the low-noise one alone."""
    low = save_base("wan", tmp_path / "low", seed=1)
    layer, (down, up) = next(iter(matrices.items()))
    both = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    both |= {f"transformer_2.{layer}.lora_A.weight": down.clone(), f"transformer_2.{layer}.lora_B.weight": -up}
    save_file(both, tmp_path / "both.safetensors")
    choices = read_choices(str(tmp_path / "both.safetensors"))

    def changes(*loras) -> tuple[Tensor, Tensor]:
        experts, plain = load_denoiser(wan, low, torch.float32, *loras), load_denoiser(wan, low)
        weights = [
            (m.high.state_dict()[f"{layer}.weight"], m.low.state_dict()[f"{layer}.weight"]) for m in (experts, plain)
        ]
        return weights[0][0] - weights[1][0], weights[0][1] - weights[1][1]

    zero = torch.zeros(len(up), down.shape[1])
    for loras, expected in (
        ((choices,), (up @ down, -up @ down)),
        (((), choices), (zero, -up @ down)),
        ((choices, ()), (up @ down, zero)),
    ):
        for change, right in zip(changes(*loras), expected, strict=True):
            torch.testing.assert_close(change, right, rtol=1e-4, atol=1e-5)
    one = {name: tensor for name, tensor in both.items() if "transformer_2" not in name}
    save_file(one, tmp_path / "one.safetensors")
    plain = read_choices(str(tmp_path / "one.safetensors"))
    torch.testing.assert_close(changes((), plain)[1], up @ down, rtol=1e-4, atol=1e-5)  # a file of no expert's
    with pytest.raises(UserError, match="this model is a single one"):
        load_denoiser(wan, None, torch.float32, (), choices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"transformer.blocks.7.attn1.to_q.lora_A.weight": torch.ones(2, 2)},
            "1 unknown tensors: .*blocks.7",
        ),
        (lambda t: t | {"transformer.text_model.0.lora_A.weight": torch.ones(2, 2)}, "unknown tensors: .*text_model"),
        (lambda t: t | {"transformer.blocks.0.attn1.to_q.dora_scale": torch.ones(2)}, "unknown tensors: .*dora_scale"),
        (lambda t: {n: x for n, x in t.items() if "lora_B" not in n}, "holds one half of the LoRA of blocks"),
        (lambda t: {n: x[:, :-1].clone() for n, x in t.items()}, "3 misshapen: .*blocks"),
        (lambda t: {"nothing": torch.ones(1)}, "unknown tensors: nothing"),
        (lambda t: t | {UP: torch.ones(16)}, rf"{UP} has the shape \(16,\) and must be a matrix; fetch it again"),
        (lambda t: t | {DOWN: torch.ones(2)}, rf"{DOWN} has the shape \(2,\) and must be a matrix"),
        (lambda t: t | {UP: torch.ones(()), DOWN: torch.ones(())}, rf"{UP} has the shape \(\) and must be a matrix"),
        (
            lambda t: t | {UP: torch.ones(16, 0), DOWN: torch.ones(0, 16)},
            rf"lora.safetensors: {UP} has the shape \(16, 0\) and must be a matrix",
        ),
        (lambda t: t | {UP: torch.ones(*t[UP].shape, 3)}, "1 misshapen: .*blocks"),
        (lambda t: t | {ALPHA: torch.ones(2)}, rf"{ALPHA} \[1.0, 1.0\] must be one finite number; fetch it again"),
        (
            lambda t: t | {ALPHA: torch.tensor(math.nan)},
            rf"lora.safetensors: {ALPHA} \[nan\] must be one finite number",
        ),
        (lambda t: t | {DOWN.replace("weight", "bias"): torch.ones(2)}, "1 unknown tensors: .*lora_A.bias"),
        (
            lambda t: t | {UP.replace("transformer.", "base_model.model."): torch.ones(16, 2)},
            "1 of a layer that has them already: transformer.blocks",
        ),
    ],
)
def test_what_is_no_lora_of_the_model_is_refused(change, message, wan, matrices, tmp_path):
    save_file(change(in_form("diffusers", matrices)), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(wan, loras=[LoraChoice(tmp_path / "lora.safetensors")])


@pytest.mark.parametrize(
    "setting", [3, [3], "", [" "], [{"weight": 1}], [{"path": "a", "weight": "x"}], [{"path": "a", "b": 1}]]
)
def test_a_setting_that_names_no_lora_is_refused(setting):
    with pytest.raises(UserError, match="must be a path"):
        read_choices(setting)


def test_settings():
    assert read_choices(None) == read_choices([]) == ()
    assert read_choices("a") == read_choices(["a"]) == read_choices({"path": "a"}) == (LoraChoice(Path("a")),)
    assert read_choices([{"path": "a", "weight": 2}, "b"]) == (LoraChoice(Path("a"), 2.0), LoraChoice(Path("b")))
