"""The fused ops inside an untouched diffusers WanTransformer3DModel: parity, wrapping, removal, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from dropin_models import RATIOS, error, gradients, inputs, output, truth, wan
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from geoalign_kernels import UnknownNetwork, accelerate, attention
from geoalign_kernels.dispatch import BackendUnavailableError

Gradients = tuple[Tensor, dict[str, Tensor]]
LORA = LoraConfig(
    r=4, lora_alpha=8, init_lora_weights=False,
    target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
)  # fmt: skip


def together(found: Gradients) -> Tensor:
    """All gradients as one vector: that of a key's bias vanishes but for rounding."""
    return torch.cat([found[1][name].double().flatten() for name in sorted(found[1])])


def assert_same_bits(first: Gradients, second: Gradients) -> None:
    assert torch.equal(first[0], second[0]) and first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def assert_rounding_apart(got: Gradients, want: Gradients) -> None:
    assert got[1].keys() == want[1].keys()
    assert error(got[0], want[0]) < 1e-6 and error(together(got), together(want)) < 1e-6


@pytest.mark.parametrize("kind", RATIOS)
def test_float32_outputs_and_gradients(kind: str) -> None:
    given, model = inputs(kind), wan(kind)
    accelerate(model)
    got = gradients(model, given)
    assert_rounding_apart(got, gradients(wan(kind), given))
    assert_rounding_apart(got, truth(lambda: wan(kind), given))


def test_bfloat16_is_no_further_from_float64_than_diffusers() -> None:
    """Over ratios and seeds together; one case scatters by some percent to either side."""
    own, stock = torch.zeros(2), torch.zeros(2)
    for kind in ("t2v", "i2v", "14b"):
        for seed in range(3):
            given, model = inputs(kind, torch.bfloat16), wan(kind, torch.bfloat16, seed)
            exact, plain = truth(lambda k=kind, s=seed: wan(k, torch.bfloat16, s), given), gradients(model, given)
            accelerate(model)
            fused = gradients(model, given)
            assert fused[0].dtype == plain[0].dtype
            own += torch.tensor([error(fused[0], exact[0]), error(together(fused), together(exact))])
            stock += torch.tensor([error(plain[0], exact[0]), error(together(plain), together(exact))])
    assert bool((own <= 1.02 * stock).all()), f"{own.tolist()} against {stock.tolist()}"


@pytest.mark.parametrize("level", ["lossless", "rounding"])
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_removal_restores_the_bits_and_names_never_change(kind: str, level: str) -> None:
    given, model = inputs(kind), wan(kind)
    before, names = gradients(model, given), list(model.state_dict())
    handle = accelerate(model, level=level)  # type: ignore[arg-type]
    assert list(model.state_dict()) == names
    if level == "lossless":
        for _ in range(2):
            assert_same_bits(gradients(model, given), before)
    else:
        assert not torch.equal(gradients(model, given)[0], before[0])
    handle.remove()
    assert_same_bits(gradients(model, given), before)
    accelerate(model).remove()


def test_shapes_and_dtypes_may_change_between_calls() -> None:
    """Tables are kept by video shape, made in inference mode or not, and given up when the module is cast."""
    model, plain = wan(), wan()
    accelerate(model)
    with torch.inference_mode():
        output(model, inputs())
    for frames in (3, 2, 3):
        given = inputs() | {"hidden_states": inputs()["hidden_states"][:, :, :frames]}
        assert_rounding_apart(gradients(model, given), gradients(plain, given))
    got, want = (output(m.bfloat16(), inputs(dtype=torch.bfloat16)) for m in (model, plain))
    assert error(got, want) < 2e-2


def test_one_modulation_per_token_keeps_the_blocks_own_code() -> None:
    """Wan2.2 TI2V: timesteps [B, tokens]."""
    given = inputs() | {"timestep": torch.linspace(0, 900, 2 * 36).view(2, 36)}
    model = wan()
    accelerate(model)
    assert_rounding_apart(gradients(model, given), gradients(wan(), given))


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_before_or_after(lora_first: bool) -> None:
    given = inputs()

    def adapted(fused: bool) -> nn.Module:
        model = wan()
        if fused and not lora_first:
            accelerate(model)
        torch.manual_seed(1)
        model = get_peft_model(model, copy.deepcopy(LORA))
        if fused and lora_first:
            accelerate(model)
        return model

    model, plain = adapted(True), adapted(False)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_rounding_apart(gradients(model, given), gradients(plain, given))
    with model.disable_adapter():
        assert error(output(model, given), output(wan(), given)) < 1e-6


def test_gradient_checkpointing_and_deep_copies() -> None:
    given, model = inputs(), wan()
    accelerate(model)
    plain = gradients(model, given)
    twin = copy.deepcopy(model).train()
    twin.enable_gradient_checkpointing()
    assert_same_bits(gradients(twin, given), plain)
    with torch.no_grad():
        next(twin.blocks[0].parameters()).add_(1.0)
    assert not torch.equal(output(twin, given), plain[0])
    assert torch.equal(output(model, given), plain[0])


def test_fused_projections() -> None:
    given, model, plain = inputs("i2v"), wan("i2v"), wan("i2v")
    for net in (model, plain):
        net.fuse_qkv_projections()
    accelerate(model)
    assert error(output(model, given), output(plain, given)) < 1e-6


def test_blocks_compile_whole_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph; ``aot_eager`` traces like inductor and runs the ops unchanged, but adds gradients in another order.

    With ``compile=True`` equal blocks share one graph.
    """
    given, model = inputs(), wan()
    accelerate(model)
    eager = gradients(model, given)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    traced = gradients(model, given)
    assert torch.equal(traced[0], eager[0])
    assert_rounding_apart(traced, eager)

    graphs, compiler = [], torch.compile

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend=backend, **options))
    torch._dynamo.reset()
    twin = wan()
    accelerate(twin, compile=True)
    assert_same_bits(gradients(twin, given), eager)
    assert len(graphs) == 1


@pytest.mark.parametrize("level", ["lossless", "rounding"])
def test_the_whole_network_compiles_to_the_same_bits(level: str) -> None:
    given, model = inputs(), wan()
    accelerate(model, level=level)  # type: ignore[arg-type]
    eager = output(model, given)
    torch._dynamo.reset()
    assert torch.equal(output(torch.compile(model, backend="aot_eager", fullgraph=True), given), eager)


def test_the_window_refuses_quantised_attention() -> None:
    handle = accelerate(wan())
    q = torch.randn(1, 4, 1, 32)
    with torch.no_grad():
        attention(q, q, q, mode="int8")
        with handle.window(), pytest.raises(RuntimeError, match="SDE window"):
            attention(q, q, q, mode="int8")


def test_the_report_names_what_runs_and_what_was_left_alone() -> None:
    handle = accelerate(wan("i2v"))
    rows = {row["part"]: row for row in handle.report()}
    assert "qk_norm_rotary" in rows["blocks.*.attn1"]["runs"]
    assert rows["blocks.*: linears and ffn"]["runs"] == "left alone" and rows["blocks.*: linears and ffn"]["why"]
    assert rows["attention core"]["runs"] == "auto: sdpa_flash for torch.float32 on cpu"
    assert rows["check of block 0 against its own code"]["runs"] == "agrees"
    kept = accelerate(wan(), level="lossless").report()
    assert [row["runs"] for row in kept] == ["kept for each video shape", "left alone"]


def test_the_check_draws_nothing_from_the_callers_generators() -> None:
    config = copy.deepcopy(LORA)
    config.lora_dropout = 0.5
    model = get_peft_model(wan(), config).train()
    state = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in model.modules())


def test_what_cannot_be_accelerated_is_refused() -> None:
    with pytest.raises(UnknownNetwork, match=r"diffusers WanTransformer3DModel .* Linear has no list of blocks"):
        accelerate(nn.Linear(2, 2))
    other = nn.Module()
    other.blocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnknownNetwork, match=r"Module has blocks of Linear\(input\)"):
        accelerate(other)
    custom = wan()
    custom.blocks[1].attn1.processor = lambda *_: None
    with pytest.raises(UnknownNetwork, match=r"blocks.1.attn1 has the processor function, not WanAttnProcessor"):
        accelerate(custom)
    with pytest.raises(ValueError, match="level 'fast'"):
        accelerate(wan(), level="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compile=True changes bits"):
        accelerate(wan(), level="lossless", compile=True)
    with pytest.raises(ValueError, match="attention='flash9'"):
        accelerate(wan(), attention="flash9")
    with pytest.raises(BackendUnavailableError, match="flash3"):
        accelerate(wan(), attention="flash3")
    twice = wan()
    accelerate(twice)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(twice, level="lossless")


def test_a_version_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wan()
    kind = type(model.blocks[0])
    own = kind.forward

    def changed(
        self: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor
    ):
        return own(self, hidden_states, encoder_hidden_states, temb, rotary_emb) * 1.001

    monkeypatch.setattr(kind, "forward", changed)
    with pytest.raises(UnknownNetwork, match="computes something that the adapter does not know"):
        accelerate(model)


def test_what_was_replaced_afterwards_must_be_undone_first() -> None:
    model = wan()
    handle = accelerate(model)
    model.set_attention_backend("native")
    with pytest.raises(RuntimeError, match="choose the core by accelerate"):
        output(model, inputs())
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda *args: own(*args)
    with pytest.raises(RuntimeError, match=r"WanTransformerBlock\.forward was replaced"):
        handle.remove()
