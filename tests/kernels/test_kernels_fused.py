import pytest
import torch

from cluster.kernels import native
from cluster.kernels.reference import rms_norm_reference, rope_reference

pytestmark = pytest.mark.skipif(bool(native.load()), reason=native.load())

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 32), (3, 320), (40, 100)])
def test_rms_norm_is_the_reference(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    torch.manual_seed(0)
    x_TD, weight_D = (3 * torch.randn(num_tokens, size)).to(dtype), torch.randn(size).to(dtype)
    got = torch.ops.sluice.rms_norm(x_TD, weight_D, 1e-6)
    expected = rms_norm_reference(x_TD, weight_D, 1e-6)
    torch.testing.assert_close(got, expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_rope_rotates_queries_and_keys_and_leaves_values(
    dtype: torch.dtype, has_norms: bool, num_tokens: int
) -> None:
    torch.manual_seed(0)
    heads, kv_heads, head_dim = 6, 2, 32
    qkv_TXH = torch.randn(num_tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    angles_TH = torch.rand(num_tokens, head_dim // 2).repeat(1, 2) * 6
    cos_TH, sin_TH = angles_TH.cos().to(dtype), angles_TH.sin().to(dtype)
    norms = [torch.rand(head_dim).to(dtype) + 0.5 if has_norms else None for _ in range(2)]
    expected = qkv_TXH.clone()
    for part, norm in (
        (slice(0, heads), norms[0]),
        (slice(heads, heads + kv_heads), norms[1]),
    ):
        x = expected[:, part].float()
        if norm is not None:
            x = rms_norm_reference(x, norm.float(), 1e-6)
        expected[:, part] = rope_reference(x, cos_TH.float(), sin_TH.float()).to(dtype)
    got = qkv_TXH.flatten(1).clone()
    torch.ops.sluice.rope_(got, cos_TH, sin_TH, heads, kv_heads, *norms, 1e-6)
    tolerance = 4 * DTYPES[dtype]
    torch.testing.assert_close(
        got.view_as(expected), expected, rtol=tolerance, atol=tolerance, equal_nan=False
    )
    assert torch.equal(got.view_as(expected)[:, heads + kv_heads :], qkv_TXH[:, heads + kv_heads :])


def test_rope_refuses_angles_of_other_tokens() -> None:
    qkv = torch.zeros(3, 4 * 32)
    angles_TH = torch.zeros(2, 32)
    with pytest.raises(RuntimeError, match="cos and sin"):
        torch.ops.sluice.rope_(qkv, angles_TH, angles_TH, 2, 1, None, None, 1e-6)
