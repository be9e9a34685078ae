"""These tests are about LoRA: what is adapted, saved, restored and merged, and into which weights."""

import copy
import json
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moc import MoCConfig, Sample, make_batch
from moc.diffusion import Flow
from moc.errors import UserError
from moc.training import Parallel, ParallelConfig
from moc.training.checkpoint import new_checkpoint, write_state
from models import Family, ModelConfig, build_model, load_model, save_model
from models.checkpoints.contents import Contents
from models.checkpoints.export import Form, convert
from models.checkpoints.opening import open_checkpoint
from models.checkpoints.seen import Seen
from models.checkpoints.tensors import TensorSource
from models.encoders.fingerprint import tensors_digest
from models.mmdit import MMDiT
from models.wan import TEXT_TOKENS, WanTransformer3DModel
from tests import pipeline
from tests.wan_files import MMDIT, REDUCED, reduced_wan, same, save_original

EXACT = {"rtol": 1e-4, "atol": 1e-5}
DENSE = MoCConfig(dense=True)
SCRIPT = "scripts/convert_checkpoint.py"


def save_base(family: str, folder: Path, seed: int = 0) -> Path:
    """Returns a model with every weight drawn, so that none hides an adapter behind a zero."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**REDUCED) if family == "wan" else MMDiT(**MMDIT, input_skip=True, frame_place=True)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.05)
    save_model(model, folder, MoCConfig())
    return folder


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def settings_for(base: Path, rank: int, targets: list[str]) -> ModelConfig:
    """Returns the settings of an adapter, with the family of its base."""
    family = Family.mmdit if open_checkpoint(base).kind == "MMDiT" else Family.wan
    return ModelConfig(family, str(base), lora_rank=rank, lora_targets=targets)


def adapted(base: Path, targets: list[str], rank: int = 2) -> ModelMixin:
    """Returns a model with an adapter that does something."""
    model = build_model(settings_for(base, rank, targets), 4, 12)
    for name, weight in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(weight, 0, 0.1)
    return model


def save_run(model: ModelMixin, run: Path, moc: MoCConfig, step: int = 10) -> Path:
    with new_checkpoint(run, step) as folder:
        save_model(model, folder / "ema", moc)
        write_state(folder, {"step": step, "flow": {"shift": 7.0}})
    return run


def velocity(model: ModelMixin, config: MoCConfig = DENSE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels, text_dim = (4, 12) if isinstance(model, MMDiT) else (16, 24)
    latents = [torch.randn(channels, 2, 4, 6, generator=generator) for _ in range(2)]
    text = [torch.randn(rows, text_dim, generator=generator) for rows in (3, 2, 4)]
    batch = make_batch([Sample(latents, text)], model.stream, config.chunk_tokens)
    with torch.no_grad():
        return model.eval()(batch.latents, torch.tensor([0.3, 0.8]), batch.text, batch.layout, config)


@pytest.fixture(params=["wan", "mmdit"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_base(request.param, tmp_path / "base")


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    return save_base("wan", tmp_path / "base")


def test_it_saves_restores_and_merges(base: Path, tmp_path: Path) -> None:
    plain = load_model(base)
    targets = ["to_qkv", "ffn.2"] if isinstance(plain, MMDiT) else ["to_q", "net.2"]
    model = adapted(base, targets)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    save_model(model, tmp_path / "tuned", MoCConfig(top_k=2))
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {
        *("config.json", "lora.json", "moc.json", "pytorch_lora_weights.safetensors")
    }
    restored = build_model(settings_for(base, 2, targets), 4, 12)
    restored.load_weights(tmp_path / "tuned")
    assert same(restored, model.state_dict())

    assert open_checkpoint(tmp_path / "tuned").moc == MoCConfig(top_k=2)
    (tmp_path / "tuned/moc.json").unlink()
    assert open_checkpoint(tmp_path / "tuned").moc == MoCConfig()  # the base's settings
    merged = load_model(tmp_path / "tuned")
    changed = {n for n, w in merged.state_dict().items() if not torch.equal(w, plain.state_dict()[n])}
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert changed == {n for n in plain.state_dict() if n.endswith(tuple(f"{t}.weight" for t in targets))}
    delta = merged.state_dict()[min(changed)] - plain.state_dict()[min(changed)]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) == 2
    assert all(weight.requires_grad for weight in merged.parameters())


def test_it_has_a_gap_at_cuts_of_its_own(wan: Path, tmp_path: Path) -> None:
    for gap in (3.0, 0.0, None):
        tuned = tmp_path / f"tuned_{gap}"
        base = tmp_path / "tuned_3.0" if gap == 0 else wan
        save_model(build_model(replace(settings_for(base, 2, ["to_q"]), cut_gap=gap), 16, 24), tuned, MoCConfig())
        assert load_model(tuned).config.cut_gap == (gap or 0)


def test_every_linear_can_be_adapted_and_merging_changes_no_output(base: Path, tmp_path: Path) -> None:
    """Each linear is called by the forward as a module, or its adapter would have no gradient."""
    names = linear_names(load_model(base))
    model = adapted(base, names, rank=3)
    assert {name.removesuffix(".base_layer") for name in linear_names(model) if "lora" not in name} == set(names)
    save_model(model, tmp_path / "tuned", MoCConfig())
    for config in (DENSE, MoCConfig(chunk_tokens=12, top_k=1, causal=False)):
        before, with_adapter = velocity(load_model(base), config), velocity(model, config)
        merged = velocity(load_model(tmp_path / "tuned"), config)
        for a, b, c in zip(before, with_adapter, merged, strict=True):
            torch.testing.assert_close(b, c, **EXACT)
            assert (a - b).norm() > 0.05 * a.norm()

    called = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    velocity(model)
    assert set(called) == set(names)


def test_diffusers_own_model_gives_the_same_with_our_adapter(tmp_path: Path) -> None:
    theirs = reduced_wan()
    theirs.save_pretrained(tmp_path / "base")
    ours = adapted(tmp_path / "base", linear_names(load_model(tmp_path / "base")))
    ours.save_pretrained(tmp_path / "lora")
    others = {
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": diffusers.UniPCMultistepScheduler(),
    }
    plain = copy.deepcopy(theirs)
    diffusers.WanPipeline(transformer=theirs, **others).load_lora_weights(tmp_path / "lora")
    latent, text = torch.randn(16, 3, 4, 6), torch.randn(20, REDUCED["text_dim"])
    padded = torch.cat([text, torch.zeros(TEXT_TOKENS - 20, REDUCED["text_dim"])])
    batch = make_batch([Sample([latent], [text[:6], text[6:]])], ours.stream, 24)
    with torch.no_grad():
        before, expected = (
            model.eval()(latent[None], torch.tensor([370.0]), padded[None], return_dict=False)[0][0]
            for model in (plain, theirs)
        )
        (out,) = ours.eval()(batch.latents, torch.tensor([0.37]), batch.text, batch.layout, DENSE)
    assert (out - expected).norm() < 1e-5 * expected.norm()
    assert (before - expected).norm() > 0.05 * expected.norm()


# The weights it belongs to


def test_a_newer_checkpoint_of_the_base_run_is_not_taken(tmp_path: Path) -> None:
    first, second = (load_model(save_base("mmdit", tmp_path / f"model{seed}", seed)) for seed in (1, 2))
    run = save_run(first, tmp_path / "full", MoCConfig(), step=10)
    model = adapted(run, ["to_qkv"])
    save_model(model, tmp_path / "tuned", MoCConfig())
    expected = load_model(tmp_path / "tuned").state_dict()
    save_run(second, run, MoCConfig(), step=20)
    assert same(load_model(tmp_path / "tuned"), expected)

    newer = build_model(ModelConfig(path=str(run), lora_rank=2, lora_targets=["to_qkv"]), 4, 12)
    with pytest.raises(UserError, match=r"a LoRA of .*step_0000010/ema, whose weights are not those of .*20/ema: set"):
        newer.load_weights(tmp_path / "tuned")
    old = run / "checkpoints/step_0000010"
    shutil.copytree(run / "checkpoints/step_0000020/ema", old / "ema", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"LoRA of .*step_0000010/ema, where other weights lie now"):
        load_model(tmp_path / "tuned")
    shutil.rmtree(old)
    with pytest.raises(UserError, match=r"LoRA of .*step_0000010/ema, which does not exist: put it back, or set base"):
        load_model(tmp_path / "tuned")


def test_a_run_restores_an_adapter_of_its_own_weights_wherever_they_lie(tmp_path: Path) -> None:
    base, moved = save_base("mmdit", tmp_path / "base", seed=1), tmp_path / "moved"
    model = adapted(base, ["to_qkv"])
    save_model(model, tmp_path / "tuned", MoCConfig())
    base.rename(moved)
    adapted(moved, ["to_qkv"]).load_weights(tmp_path / "tuned")
    other = adapted(save_base("mmdit", base, seed=2), ["to_qkv"])
    with pytest.raises(ValueError, match=r"a LoRA of .*base, whose weights are not those of .*base: set"):
        other.load_weights(tmp_path / "tuned")


def test_the_fingerprint_tells_weights_not_forms(tmp_path: Path) -> None:
    theirs = reduced_wan()
    theirs.save_pretrained(tmp_path / "diffusers")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    save_original(theirs, tmp_path / "original.safetensors")
    paths = [tmp_path / "diffusers", tmp_path / "sharded", tmp_path / "original.safetensors"]
    assert len({open_checkpoint(path).fingerprint() for path in paths}) == 1
    with torch.no_grad():
        theirs.blocks[1].attn1.to_q.weight += 1e-3
    theirs.save_pretrained(tmp_path / "other")
    assert open_checkpoint(tmp_path / "other").fingerprint() != open_checkpoint(paths[0]).fingerprint()
    whole = ("a", (2, 2), torch.zeros(4))
    others = [("b", *whole[1:]), ("a", (4,), whole[2]), (*whole[:2], torch.zeros(4, dtype=torch.int32))]
    assert len({tensors_digest([one]) for one in (whole, *others)}) == 4


def test_an_adapter_on_a_merged_one(tmp_path: Path) -> None:
    base = save_base("wan", tmp_path / "base")
    save_model(adapted(base, ["to_q"]), tmp_path / "first", MoCConfig())
    second = adapted(tmp_path / "first", ["to_q", "to_k"])
    save_model(second, tmp_path / "second", MoCConfig())
    for a, b in zip(velocity(second), velocity(load_model(tmp_path / "second")), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert adapted(tmp_path / "second", ["to_v"]).lora.base == str(tmp_path / "second")
    save_model(adapted(base, ["to_q"]), tmp_path / "again", MoCConfig())
    shutil.copytree(tmp_path / "again", tmp_path / "first", dirs_exist_ok=True)
    with pytest.raises(UserError, match="where other weights lie now"):
        load_model(tmp_path / "second")


# Conversion


@pytest.mark.parametrize("dtype", ["stored", "float32"])
def test_the_command_merges_a_run_into_every_form(dtype: str, wan: Path, tmp_path: Path, capsys) -> None:
    stored = tmp_path / "bfloat16"
    convert(open_checkpoint(wan), stored, torch.bfloat16)
    model = adapted(stored, ["to_q", "net.2", "proj_out"])
    run = save_run(model, tmp_path / "run", MoCConfig(top_k=3))
    base, adapter = (
        TensorSource(stored),
        load_file(run / "checkpoints/step_0000010/ema" / "pytorch_lora_weights.safetensors"),
    )
    expected = {}
    for name in base.names():
        a, b = (adapter.get(f"transformer.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        exact = base.read(name).double() if a is None else base.read(name).double() + b.double() @ a.double()
        expected[name] = exact.float() if dtype == "float32" else exact.to(base.read(name).dtype)
    pipeline.command(SCRIPT, f"input={run}")
    assert f"{run}: LoRA of rank 2 on {stored.resolve()}, merged: a Wan model: 0.6 M" in capsys.readouterr().out
    for form, output in ((Form.diffusers, "out"), (Form.original, "out.safetensors"), (Form.checkpoint, "out_run")):
        pipeline.command(SCRIPT, f"input={run}", f"output={tmp_path / output}", f"form={form}", f"dtype={dtype}")
        found = open_checkpoint(tmp_path / output)
        assert not found.adapters
        assert found.moc == (None if form is Form.original else MoCConfig(top_k=3))
        assert found.stored.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found.read(name), weight, rtol=0 if dtype == "stored" else 1e-6, atol=1e-6)
    written = Contents(tmp_path / "out_run/checkpoints/step_0000000")
    assert (written.moc, written.flow) == (MoCConfig(top_k=3), Flow(shift=7.0))


def test_merging_holds_one_tensor_of_the_base(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(adapted(wan, ["to_q", "net.2"]), tmp_path / "lora", MoCConfig())
    read, alive, most = TensorSource.read, [], 0

    def counted(source: TensorSource, name: str) -> Tensor:
        nonlocal most
        tensor = read(source, name)
        if "lora" not in name:
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(TensorSource, "read", counted)
    convert(open_checkpoint(tmp_path / "lora"), tmp_path / "out")
    assert (most, len(alive)) == (1, len(TensorSource(wan)))


def test_the_commands_train_resume_convert_and_refuse(trained, prepared, tmp_path: Path, capsys) -> None:
    settings = (f"model.path={trained}", "model.lora_rank=2", "optim.lr=0.1", "optim.warmup_steps=0")
    run, targets = tmp_path / "run", "model.lora_targets=[to_qkv,ffn.2]"
    pipeline.train(prepared, run, *settings, targets, "trainer.num_steps=1")
    pipeline.train(prepared, run, *settings, targets, "trainer.num_steps=2")
    pipeline.command(SCRIPT, f"input={run}", f"output={tmp_path}/merged", "form=checkpoint")
    merged = open_checkpoint(tmp_path / "merged")
    assert same(load_model(run), load_model(tmp_path / "merged").state_dict())
    assert not same(load_model(trained), load_model(tmp_path / "merged").state_dict())
    assert merged.moc == open_checkpoint(run).moc
    assert (merged.root / "encoders/encoders.json").is_file()
    assert Seen.read(Contents(tmp_path / "merged")).sizes == [[32, 48]]
    said = pipeline.refusal(
        *(capsys, "train.py", *pipeline.train_arguments(prepared, tmp_path / "typo"), *settings),
        "model.lora_targets=[to_qkv,to_kk]",
    )
    assert said.startswith("error: LoRA target 'to_kk' is no linear layer of this model; it has video_in, ")


# Refusals


def test_bad_settings_are_refused(wan: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be 0, or above 0 with model"):
        ModelConfig(lora_rank=4)
    with pytest.raises(UserError, match="a LoRA needs weights to adapt"):
        build_model(ModelConfig(lora_rank=4, lora_targets=["to_q"]), 16, 24)
    for target in ("to_kk", "patch_embedding", "norm_q", "to_out", "q", ""):
        with pytest.raises(
            ValueError, match=f"target '{target}' is no linear layer of this model; it has .*attn1.to_q"
        ):
            adapted(wan, ["to_q", target])
    small, large = (adapted(wan, ["to_q"], rank) for rank in (2, 3))
    small.save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match=r"is not a whole LoRA of rank 3 on \['to_q'\]: 8 misshapen"):
        large.load_weights(tmp_path / "lora")
    with pytest.raises(UserError, match="is not a whole WanTransformer3DModel: 69 missing"):
        load_model(wan).load_weights(tmp_path / "lora")


def test_an_adapter_must_be_whole(wan: Path, tmp_path: Path) -> None:
    save_model(adapted(wan, ["to_q"]), tmp_path / "lora", MoCConfig())
    file = tmp_path / "lora/pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    tensors["transformer.blocks.9.attn1.to_q.lora_A.weight"] = tensors.pop(
        "transformer.blocks.1.attn1.to_q.lora_A.weight"
    )
    save_file(tensors, file)
    message = r"lora is not a whole LoRA: 1 missing: transformer\.blocks\.1\.attn1.*; 1 unexpected: .*blocks\.9\."
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "lora")


def test_a_bad_lora_json_is_one_clear_message(wan: Path, tmp_path: Path) -> None:
    save_model(adapted(wan, ["to_q"]), tmp_path / "lora", MoCConfig())
    file = tmp_path / "lora/lora.json"
    values = json.loads(file.read_text())
    for text, message in {
        file.read_text()[:30]: "is damaged or no JSON file",
        json.dumps({k: v for k, v in values.items() if k != "base"}): ": lacks base; restore",
        json.dumps(values | {"alpha": 3}): ": has an unknown field alpha; restore",
        json.dumps(values | {"rank": "2"}): ": rank='2' is not a whole number above 0; restore",
        json.dumps(values | {"targets": "to_q"}): ": targets='to_q' is not a list of names; restore",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError, match=f"lora.json.*{message}"):
            load_model(tmp_path / "lora")


def test_without_an_adapter_nothing_of_peft_is_imported(tmp_path, monkeypatch):
    """It takes seconds of every command. Diffusers' own way to move a model would import it."""
    for module in ("peft", "diffusers.hooks", "diffusers.hooks.group_offloading"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    model = MMDiT(**MMDIT)
    Parallel(ParallelConfig("cpu")).spread(model)
    save_model(model, tmp_path, MoCConfig())
    assert same(load_model(tmp_path), model.state_dict())
