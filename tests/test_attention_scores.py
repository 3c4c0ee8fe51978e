"""Attention kernels against a reference of one query and one head at a time, and the maxima they report."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ATTENTIONS, small_config, small_model, tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quack_lm.attention import flash
from quack_lm.attention.mask import Mask, count_documents, document_cuts, number_documents
from quack_lm.attention.scores import (
    MIN_ROWS,
    Backend,
    MaxLogitKernel,
    attend,
    implementation,
    logits,
    make_mask,
    max_logits,
    packed,
    packs_documents,
    resolve_backend,
    resolve_max_logits,
    row_chunks,
)
from quack_lm.errors import UserError

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and maxima from the definition, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, length, width = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=torch.float64)
    maxima = torch.full((heads,), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // group], v[b, h // group]
            for t in range(length):
                sees = [s for s in range(t + 1) if documents is None or documents[b, s] == documents[b, t]]
                scores = keys[sees] @ q[b, h, t] / math.sqrt(width)
                weights = (scores - scores.max()).exp()
                out[b, h, t] = weights / weights.sum() @ values[sees]
                maxima[h] = max(maxima[h], scores.max())
    return out, maxima


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and perhaps documents of any small shape."""
    size = st.integers(1, 5)
    batch, groups, per_group, length = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(size),
    )
    width, value_width, scale = draw(size), draw(st.integers(1, 7)), draw(st.sampled_from([0.01, 1.0, 6.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = scale * normal(batch, groups * per_group, length, width)
    k, v = normal(batch, groups, length, width), normal(batch, groups, length, value_width)
    if not draw(st.booleans()):
        return q, k, v, None
    return q, k, v, number_documents(torch.randint(3, (batch, length), generator=generator), eot_id=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@given(problem=problems())
@settings(max_examples=60)
def test_outputs_and_maxima_follow_the_definition_for_every_shape(backend: Backend, problem) -> None:
    q, k, v, documents = problem
    mask = make_mask(backend, length=q.shape[2], documents_BT=documents, device=CPU)
    out, maxima = attend(q, k, v, mask=mask, backend=backend, want_max=True)
    expected, expected_maxima = reference(q, k, v, documents)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert maxima is not None
    assert maxima.shape == (q.shape[1],)
    torch.testing.assert_close(maxima.double(), expected_maxima, rtol=1e-5, atol=1e-6)


@given(problem=problems())
@settings(max_examples=40)
def test_eager_and_sdpa_agree_in_gradients(problem) -> None:
    *inputs, documents = problem
    gradients = {}
    for backend in ("eager", "sdpa"):
        # In float64, so that no tolerance for rounding can hide a wrong term.
        q, k, v = (x.double().requires_grad_() for x in inputs)
        mask = make_mask(backend, length=q.shape[2], documents_BT=documents, device=CPU)
        out, maxima = attend(q, k, v, mask=mask, backend=backend, want_max=True)
        assert maxima is not None
        assert not maxima.requires_grad
        gradients[backend] = torch.autograd.grad((out * torch.arange(1.0, 1 + out.shape[-1])).sum(), (q, k, v))
    for eager, sdpa in zip(gradients["eager"], gradients["sdpa"], strict=True):
        torch.testing.assert_close(eager, sdpa, rtol=1e-9, atol=1e-9)


@given(problem=problems(), rows=st.integers(0, 4))
def test_logits_are_scaled_products_of_each_query_with_its_groups_key(problem, rows: int) -> None:
    q, k, _, _ = problem
    rows = min(rows, q.shape[2] - 1)
    seen = logits(q, k, rows=slice(rows, rows + 1))
    assert seen.dtype == torch.float32
    group = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        expected = torch.einsum("bk,bsk->bs", q[:, h, rows], k[:, h // group]) / math.sqrt(q.shape[-1])
        torch.testing.assert_close(seen[:, h, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_no_maximum_is_computed_unless_wanted(backend: Backend) -> None:
    x = torch.ones(1, 1, 2, 2)
    mask = make_mask(backend, length=2, documents_BT=None, device=CPU)
    assert attend(x, x, x, mask=mask, backend=backend)[1] is None


# ------------------------------------------------------------------------------------------------ maxima over many rows

LONG = 2 * MIN_ROWS + 37


def planted(*cells: tuple[int, int, int, float]) -> tuple[Tensor, Tensor]:
    """Queries and keys of 2 heads in which q[h, t] . k[h, s] / sqrt(K) is the given logit, and -1 elsewhere.

    Key s of head h has a dimension of its own only where a cell names it.
    """
    width = 1 + len(cells)
    q, k = torch.zeros(1, 2, LONG, width), torch.zeros(1, 2, LONG, width)
    q[..., 0], k[..., 0] = 1.0, -math.sqrt(width)
    for number, (head, t, s, logit) in enumerate(cells, start=1):
        q[0, head, t, number] = 1.0
        k[0, head, s, number] = (logit + 1) * math.sqrt(width)
    return q, k


@pytest.mark.parametrize("row", [0, 1, MIN_ROWS - 1, MIN_ROWS, MIN_ROWS + 1, 2 * MIN_ROWS - 1, 2 * MIN_ROWS, LONG - 1])
def test_a_maximum_is_found_in_every_block_of_rows(row: int) -> None:
    for column in {0, row // 2, row}:
        q, k = planted((0, row, column, 9.0), (1, LONG - 2, 3, 4.0))
        mask = make_mask("sdpa", length=LONG, documents_BT=None, device=CPU)
        torch.testing.assert_close(max_logits(q, k, mask), torch.tensor([9.0, 4.0]))


@pytest.mark.parametrize(("row", "column"), [(0, 1), (MIN_ROWS - 1, MIN_ROWS), (5, LONG - 1), (LONG - 2, LONG - 1)])
def test_a_logit_in_the_future_is_no_maximum(row: int, column: int) -> None:
    q, k = planted((0, row, column, 50.0))
    mask = make_mask("sdpa", length=LONG, documents_BT=None, device=CPU)
    # All that is visible is -1: a maximum may well be negative.
    torch.testing.assert_close(max_logits(q, k, mask), torch.tensor([-1.0, -1.0]))


@pytest.mark.parametrize("row", [MIN_ROWS - 2, MIN_ROWS + 7, LONG - 1])
def test_a_logit_into_another_document_is_no_maximum(row: int) -> None:
    documents = torch.zeros(1, LONG, dtype=torch.long)
    documents[:, row - 1 :] = 1
    mask = make_mask("sdpa", length=LONG, documents_BT=documents, device=CPU)
    q, k = planted((0, row, row - 2, 50.0), (1, row, row - 1, 7.0))
    torch.testing.assert_close(max_logits(q, k, mask), torch.tensor([-1.0, 7.0]))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("has_documents", [False, True])
def test_maxima_beyond_one_block_of_rows_equal_those_of_the_whole_matrix(grouped: bool, has_documents: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, 4, LONG, 6, generator=generator)
    k, v = (torch.randn(2, 2 if grouped else 4, LONG, w, generator=generator) for w in (6, 3))
    documents = number_documents(torch.randint(300, (2, LONG), generator=generator), 0) if has_documents else None
    mask = make_mask("eager", length=LONG, documents_BT=documents, device=CPU)
    eager_out, eager_max = attend(q, k, v, mask=mask, backend="eager", want_max=True)
    out, maxima = attend(q, k, v, mask=mask, backend="sdpa", want_max=True)
    torch.testing.assert_close(out, eager_out, rtol=1e-4, atol=1e-5)
    assert maxima is not None
    torch.testing.assert_close(maxima, eager_max)


@given(length=st.integers(1, 50), rows=st.integers(1, 12))
def test_blocks_of_rows_cover_every_row_once(length: int, rows: int) -> None:
    chunks = row_chunks(length, rows)
    assert [t for chunk in chunks for t in range(chunk.start, chunk.stop)] == list(range(length))
    assert all(chunk.stop - chunk.start <= rows for chunk in chunks)


def test_maxima_in_bfloat16_are_within_its_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 40, 16, generator=generator).bfloat16() for _ in range(2))
    mask = make_mask("sdpa", length=40, documents_BT=None, device=CPU)
    maxima = max_logits(q, k, mask)
    assert maxima.dtype == torch.float32
    torch.testing.assert_close(maxima.double(), reference(q, k, k, None)[1], rtol=1e-2, atol=1e-2)


def test_documents_are_numbered_from_zero_and_end_with_their_end_of_text() -> None:
    tokens = torch.tensor([[5, 9, 9, 5, 5, 9, 5], [9, 5, 5, 5, 5, 5, 5]])
    expected = [[0, 0, 1, 2, 2, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert number_documents(tokens, 9).tolist() == expected


# ------------------------------------------------------------------------------------------------ what cannot run here


@pytest.mark.parametrize("backend", ["flash", "flex"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gpu_backends_refuse_a_cpu_and_name_the_key_and_the_mend(backend: Backend, precision: str) -> None:
    with pytest.raises(UserError, match=rf"attention\.backend={backend} .*CUDA.* cpu.*attention\.backend=sdpa"):
        resolve_backend(backend, device="cpu", precision=precision, head_width=64)


@pytest.mark.skipif(bool(flash.installed_versions()), reason="a flash-attn is installed")
def test_flash_without_its_package_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match=r"attention\.backend=flash .*pip install .*flash.*attention\.backend=sdpa"):
        resolve_backend("flash", device="cuda", precision="bfloat16", head_width=64)


def test_flash_refuses_float32_and_names_the_key() -> None:
    with pytest.raises(UserError, match=r"trainer\.precision=bfloat16"):
        resolve_backend("flash", device="cuda", precision="float32", head_width=64)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_eager_and_sdpa_run_everywhere(backend: Backend, device: str, precision: str) -> None:
    assert resolve_backend(backend, device=device, precision=precision, head_width=64) == backend


def test_auto_is_sdpa_and_products_of_matrices_on_a_cpu() -> None:
    assert resolve_backend("auto", device="cpu", precision="bfloat16", head_width=64) == "sdpa"
    assert resolve_max_logits("auto", device="cpu") == "matmul"
    with pytest.raises(UserError, match=r"trainer\.max_logits=flex .*CUDA.* cpu.*trainer\.max_logits=auto"):
        resolve_max_logits("flex", device="cpu")


AMPERE, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = (8, 0), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize(
    ("installed", "card", "head_width", "expected"),
    [
        ({4, 3, 2}, HOPPER, 64, 4),
        ({3, 2}, HOPPER, 64, 3),
        ({4, 3, 2}, BLACKWELL, 128, 4),
        ({4, 3, 2}, BLACKWELL, 192, 2),  # beyond what version 4 has there
        ({4, 3, 2}, AMPERE, 64, 2),
        ({4, 3, 2}, CONSUMER_BLACKWELL, 64, 2),
        ({4}, HOPPER, 256, 4),  # with nothing but version 4
        ({4}, AMPERE, 64, None),
        ({3}, BLACKWELL, 64, None),
        ({4, 3, 2}, HOPPER, 264, None),
        ({2}, (7, 5), 64, None),
        (set(), HOPPER, 64, None),
    ],
)
def test_the_newest_flash_attn_with_kernels_for_card_and_width_is_chosen(
    installed: set[int], card: tuple[int, int], head_width: int, expected: int | None
) -> None:
    assert flash.newest_version(installed, card, head_width) == expected


@pytest.mark.skipif(bool(flash.installed_versions()), reason="a flash-attn is installed")
def test_a_flash_attn_is_known_by_its_distribution_and_one_that_does_not_import_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only version 4, whose folder flash_attn has no __init__.py; and broken.
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    (tmp_path / "flash_attn/cute/__init__.py").write_text("raise RuntimeError('no cutlass\\nhere')\n")
    (tmp_path / "flash_attn_4-4.0.dist-info").mkdir()
    (tmp_path / "flash_attn_4-4.0.dist-info/METADATA").write_text("Name: flash-attn-4\nVersion: 4.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert flash.installed_versions() == {4}
    line = r"^attention\.backend=flash: flash-attn-4 does not load \(RuntimeError: no cutlass here\); .*backend=sdpa$"
    with pytest.raises(UserError, match=line):
        flash.load_version(4)
    sys.modules.pop("flash_attn", None)


@given(problem=problems())
@settings(max_examples=40)
def test_documents_in_a_row_give_what_the_mask_gives(problem) -> None:
    q, k, v, documents = problem
    if documents is None:
        documents = torch.zeros(q.shape[0], q.shape[2], dtype=torch.long)

    def each_on_its_own(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, length: int) -> Tensor:
        assert {x.shape[-1] % flash.WIDTH_MULTIPLE for x in (q, k, v)} == {0}
        assert (cuts.dtype, cuts[0].item(), cuts[-1].item()) == (torch.int32, 0, len(q))
        pieces = []
        for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            assert 0 < stop - start <= length
            # The widths are filled up, so the scale is not that of the tensors.
            one = (x[start:stop].transpose(0, 1)[None] for x in (q * (q.shape[-1] / width) ** 0.5, k, v))
            mask = make_mask("eager", length=stop - start, documents_BT=None, device=CPU)
            pieces.append(attend(*one, mask=mask, backend="eager")[0][0].transpose(0, 1))
        return torch.cat(pieces)

    width = q.shape[-1]
    whole = make_mask("eager", length=q.shape[2], documents_BT=documents, device=CPU)
    expected, _ = attend(q, k, v, mask=whole, backend="eager")
    got = packed(each_on_its_own, q, k, v, document_cuts(documents))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_compiled_blocks_call_the_flash_attn_that_was_loaded_before(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dynamo traced through functools.cache into the imports, and failed at the first package that was not there.
    def dense(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, deterministic: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    config = small_config(attention)
    plain, flashing = small_model(config), small_model(config)
    width = flash.padded_width(flashing.attentions[0].head_width)
    monkeypatch.setitem(flash.LOADED, width, flash.FlashAttention(3, torch.compiler.disable(dense), dense))
    for each in flashing.attentions:
        each.backend = "flash"
    for block in flashing.blocks:
        block.compile(backend="eager")
    losses = [model(tokens(3)[:, :-1], tokens(3)[:, 1:]).mean() for model in (plain, flashing)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for one, other in zip(plain.parameters(), flashing.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def test_documents_counted_on_the_host_are_the_cuts_on_the_device() -> None:
    tokens = torch.tensor([[5, 9, 9, 5, 5, 9, 5], [9, 5, 5, 5, 5, 5, 9], [5, 5, 5, 5, 5, 5, 5]])
    documents = number_documents(tokens, 9)
    cuts = [0, 2, 3, 6, 7, 8, 14, 21]
    assert document_cuts(documents).tolist() == cuts
    assert document_cuts(documents, count_documents(tokens, 9)).tolist() == cuts


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_flex_gives_what_eager_gives(has_documents: bool, grouped: bool) -> None:
    # Without maxima and gradients, which FlexAttention has on GPUs alone; several blocks of its mask.
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, LONG, 6, generator=generator)
    k, v = (torch.randn(2, 2 if grouped else 4, LONG, w, generator=generator) for w in (6, 3))
    documents = number_documents(torch.randint(40, (2, LONG), generator=generator), 0) if has_documents else None
    outs = []
    for backend in ("flex", "eager"):
        mask = make_mask(backend, length=LONG, documents_BT=documents, device=CPU)
        outs.append(attend(q, k, v, mask=mask, backend=backend)[0])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_a_causal_block_mask_is_made_once_for_a_length() -> None:
    one, other, longer = (make_mask("flex", length=n, documents_BT=None, device=CPU).blocks for n in (9, 9, 10))
    assert one is other
    assert longer is not one


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_mask_made_for_all_layers_is_what_a_layer_would_make(backend: Backend) -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    q = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    made = make_mask(backend, length=5, documents_BT=documents, device=CPU)
    assert made.dense is not None
    outs = [attend(q, q, q, mask=mask, backend=backend)[0] for mask in (made, Mask(documents))]
    assert torch.equal(*outs)


def test_the_kernel_that_torch_chooses_has_its_name() -> None:
    q = torch.zeros(1, 2, 8, 16, requires_grad=True)
    causal = make_mask("sdpa", length=8, documents_BT=None, device=CPU)
    names = {implementation("sdpa", *(x.to(dtype) for x in (q, q, q)), causal) for dtype in (torch.float32, torch.int8)}
    assert names == {"sdpa: FLASH_ATTENTION", "sdpa: MATH"}
    assert implementation("eager", q, q, q, causal) == "eager"


# ------------------------------------------------------------------------------------------------ on a GPU

# (query heads, key heads, key width, value width)
GPU_SHAPES = {"mha": (3, 3, 64, 64), "gqa": (6, 2, 64, 64), "mla": (3, 3, 128, 64)}


def gpu_problem(shape: str, has_documents: bool, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    heads, groups, width, value_width = GPU_SHAPES[shape]
    length, batch = 300, 2  # no multiple of a kernel's block
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(count: int, last: int) -> Tensor:
        return torch.randn(batch, count, length, last, generator=generator, device="cuda").to(dtype)

    tokens = torch.randint(60, (batch, length), generator=generator, device="cuda")
    documents = number_documents(tokens, 0) if has_documents else None
    return [2 * normal(heads, width), normal(groups, width), normal(groups, value_width)], documents


def compare_with_eager(
    backend: Backend,
    shape: str,
    has_documents: bool,
    dtype: torch.dtype,
    tolerance: float,
    max_logit_kernel: MaxLogitKernel = "matmul",
) -> None:
    inputs, documents = gpu_problem(shape, has_documents, dtype)
    results = {}
    for name, precision in ((backend, dtype), ("eager", torch.float32)):
        q, k, v = (x.detach().to(precision).requires_grad_() for x in inputs)
        mask = make_mask(
            name,
            length=q.shape[2],
            documents_BT=documents,
            device=q.device,
            packs_documents=packs_documents(name, q, max(q.shape[-1], v.shape[-1])),
            max_logits=max_logit_kernel,
        )
        out, maxima = attend(q, k, v, mask=mask, backend=name, want_max=True)
        assert maxima is not None
        loss = (out.float() * torch.linspace(-1, 1, out.shape[-1], device="cuda")).sum()
        results[name] = [out, maxima, *torch.autograd.grad(loss, (q, k, v))]
    for mine, expected in zip(results[backend], results["eager"], strict=True):
        assert mine.shape == expected.shape
        largest = expected.abs().max().item()
        torch.testing.assert_close(mine.float(), expected, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
def test_flex_agrees_with_eager_in_outputs_maxima_and_gradients(
    shape: str, has_documents: bool, dtype: torch.dtype, tolerance: float
) -> None:
    compare_with_eager("flex", shape, has_documents, dtype, tolerance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("max_logit_kernel", ["matmul", "flex"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
def test_sdpa_on_a_gpu_agrees_with_eager(
    shape: str, has_documents: bool, max_logit_kernel: MaxLogitKernel, dtype: torch.dtype, tolerance: float
) -> None:
    compare_with_eager("sdpa", shape, has_documents, dtype, tolerance, max_logit_kernel)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not flash.installed_versions(), reason="needs flash-attn")
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_flash_agrees_with_eager_in_outputs_maxima_and_gradients(shape: str, has_documents: bool) -> None:
    compare_with_eager("flash", shape, has_documents, torch.bfloat16, 3e-2)
