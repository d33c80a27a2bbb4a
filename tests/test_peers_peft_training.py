"""Training and merging against PEFT: one step of LoRA, of DoRA, of QLoRA with bitsandbytes; the merged model."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="make test-peers installs PyTorch")
transformers = pytest.importorskip("transformers", reason="make test-peers installs transformers")
peft = pytest.importorskip("peft", reason="make test-peers installs PEFT")

from test_peers_peft import CONFIGS, IDS, QUIET, logits, models, with_peft  # noqa: E402

from entrenar.adapters import LoraConfig, adapt, load_adapter, merge_adapter, merged  # noqa: E402
from entrenar.convert.gguf_adapter import export_gguf_adapter  # noqa: E402
from entrenar.kernels.packed import Nested, Packed  # noqa: E402
from entrenar.optim import AdamW  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

# -- one step of training


TARGETS = IDS[:, 1:].copy()
TARGETS[0, 3:6] = -100
LR, EPS = 1e-2, 1e-3  # of Adam: an eps that is not far below the gradients, whose last digits else decide the step


def peft_name(name):
    """Ours -> the name of the parameter in PEFT's model; they are the same."""
    return f"base_model.model.{name}"


def one_step(theirs, ours, tolerance):
    """Loss, gradients and what one step of AdamW makes of the adapter, in both."""
    out = theirs(torch.tensor(IDS[:, :-1])).logits
    their_loss = torch.nn.functional.cross_entropy(out.reshape(-1, 97), torch.tensor(TARGETS.reshape(-1)))
    their_loss.backward()
    loss = ours.loss(IDS[:, :-1], TARGETS)
    loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=tolerance)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    own = dict(ours.named_parameters())
    assert {peft_name(name) for name in own} == set(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, eps=EPS, weight_decay=0.0)
    optimizer.step()
    adam = AdamW(own.items(), lr=LR, eps=EPS, weight_decay=0.0)
    adam.step()
    assert set(adam.m) == set(own), "no state for the base"
    for name, p in own.items():
        wanted = trained[peft_name(name)]
        gradient = wanted.grad.numpy()
        far = tolerance * np.abs(gradient).max()
        np.testing.assert_allclose(p.grad, gradient, atol=far, rtol=0, err_msg=name)
        # the step is lr g / (|g| + eps), which turns an error of the gradient into lr / eps times as much
        step = LR * far / EPS + 4 * np.finfo(p.dtype).eps * np.abs(p.data).max()
        np.testing.assert_allclose(p.data, wanted.detach().numpy(), atol=step, rtol=0, err_msg=name)


STEPS = {
    name: CONFIGS[name]
    for name in ("rslora", "dora", "all-linear", "modules_to_save", "embeddings", "dora embeddings", "head")
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 2e-6), ("float32", 1e-4)])  # their RoPE tables are float32
@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS.keys())
def test_one_step_of_training_equals_peft(fields, dtype, tolerance, checkpointing, tmp_path):
    theirs, ours = models(dtype)
    theirs = with_peft(theirs, fields, **QUIET)
    for p in theirs.parameters():
        p.data = p.data.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path, trainable=True)
    ours.checkpointing = checkpointing
    one_step(theirs, ours, tolerance)


@pytest.mark.parametrize("fields", [dict(target_modules="all-linear"), dict(target_modules=["q_proj"], use_dora=True)])
def test_dropout_goes_where_peft_has_it(fields, tmp_path, monkeypatch):
    """With the same mask in both, which depends on the shape alone."""

    def mask(shape):
        return (np.random.default_rng(2).random(shape) >= 0.3) / np.float64(0.7)

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.from_numpy(mask(tuple(x.shape)))

    theirs, ours = models("float64")
    theirs = with_peft(theirs, fields | dict(lora_dropout=0.3), **QUIET)
    for p in theirs.parameters():
        p.data = p.data.to(torch.float64)
    theirs.save_pretrained(tmp_path)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_dropout["default"] = Masked()
    monkeypatch.setattr("entrenar.ops.dropout", lambda x, p: x * mask(x.shape))
    load_adapter(ours, tmp_path, trainable=True)
    one_step(theirs.train(), ours, 2e-6)
    plain = ours.eval().loss(IDS[:, :-1], TARGETS).item()
    assert plain != pytest.approx(ours.train().loss(IDS[:, :-1], TARGETS).item(), rel=1e-3), "the control"


def quantized(theirs, ours, quant_type, nested):
    """Every linear layer but the head as bitsandbytes' Linear4bit in one, as the same bytes in the other."""
    bnb = pytest.importorskip("bitsandbytes")
    modules = dict(ours.named_modules())
    for name, module in list(theirs.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        made = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type=quant_type,
            compress_statistics=nested,
        )
        made.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type=quant_type, compress_statistics=nested
        )
        made = made.to("cpu")
        made.support_avx512bf16_for_cpu = (
            False  # or it repacks, and loses digits of the scales, when no gradient is asked
        )
        parent, _, last = name.rpartition(".")
        setattr(theirs.get_submodule(parent), last, made)
        modules[name].weight = packed(made.weight, quant_type)
    theirs.is_loaded_in_4bit = True


def packed(weight, quant_type):
    state = weight.quant_state
    scales = state.absmax.numpy()
    if state.nested:
        inner = state.state2
        scales = Nested(scales, inner.code.numpy(), inner.absmax.numpy(), float(state.offset), inner.blocksize)
    return Packed(quant_type, tuple(state.shape), weight.data.numpy().reshape(-1).copy(), scales, state.blocksize)


@pytest.mark.parametrize(
    "fields", [CONFIGS["all-linear"], CONFIGS["dora"], CONFIGS["rslora"]], ids=["all", "dora", "rs"]
)
@pytest.mark.parametrize("quant_type, nested", [("nf4", True), ("nf4", False), ("fp4", True)])
def test_one_step_of_qlora_equals_peft_with_bitsandbytes(fields, quant_type, nested, tmp_path):
    theirs, ours = models()
    quantized(theirs, ours, quant_type, nested)
    theirs = with_peft(theirs, fields, **QUIET)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path, trainable=True)
    one_step(theirs, ours, 1e-4)


# -- merging


@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS.keys())
def test_the_merged_model_is_the_one_peft_merges(fields, tmp_path):
    theirs, ours = models()
    theirs = with_peft(theirs, fields, **QUIET)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    wanted = {name: p.detach().numpy() for name, p in theirs.merge_and_unload().named_parameters()}
    found = dict(merged(ours))
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6 * np.abs(array).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "fields", [dict(target_modules="all-linear"), dict(target_modules=["embed_tokens"], use_dora=True)]
)
def test_transformers_loads_the_merged_model(fields, tied, tmp_path):
    theirs, ours = models(tie_word_embeddings=tied)
    theirs = with_peft(theirs, fields, **QUIET)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_adapter(ours, tmp_path / "adapter", tmp_path / "merged", held_out=IDS)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    wanted = logits(theirs)
    np.testing.assert_allclose(logits(plain), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_the_gguf_package_reads_an_adapter(tmp_path):
    gguf = pytest.importorskip("gguf")
    _, ours = models()
    adapt(ours, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], **QUIET))
    reader = gguf.GGUFReader(export_gguf_adapter(ours, tmp_path / "a.gguf"))
    keys = gguf.Keys
    assert reader.get_field(keys.General.TYPE).contents() == gguf.GGUFType.ADAPTER
    assert reader.get_field(keys.Adapter.TYPE).contents() == "lora"
    assert reader.get_field(keys.Adapter.LORA_ALPHA).contents() == 6
    assert reader.get_field(keys.General.ARCHITECTURE).contents() == "llama"
    found = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    layers = {f"blk.{i}.attn_q.weight.lora_{x}": (4, 64) if x == "a" else (64, 4) for i in range(3) for x in "ab"}
    assert found == layers | {"token_embd.weight.lora_a": (97, 4), "token_embd.weight.lora_b": (64, 4)}
    bases = {name.rpartition(".weight.")[0] for name in found}
    known = {name.format(bid=i) for name in gguf.TENSOR_NAMES.values() for i in range(3)}
    assert bases <= known
