"""Call fagen.attention, compare it with PyTorch, and ask which kernel serves the call. It uses a GPU if it can."""

import torch

import fagen

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
torch.manual_seed(0)
q = torch.randn(2, 300, 8, 64, device=device, dtype=dtype)  # batch, length, heads, head dim
k, v = (torch.randn(2, 300, 2, 64, device=device, dtype=dtype) for _ in range(2))  # four heads of q share one

out, lse = fagen.attention(q, k, v, causal=True, return_lse=True)
print("out", tuple(out.shape), "lse", tuple(lse.shape))

# PyTorch has heads before rows. Its causal mask is fagen's where queries and keys are as many.
theirs = torch.nn.functional.scaled_dot_product_attention(
    *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
).transpose(1, 2)
print("largest difference from PyTorch:", (out - theirs).abs().max().item())
torch.testing.assert_close(out, theirs, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)

# Packed documents: a row sees its own document alone. Tiles in which nothing is visible are skipped.
ids = torch.tensor([[0] * 100 + [1] * 200] * 2, device=device)
packed = fagen.attention(q, k, v, causal=True, intervals=fagen.masks.from_documents(ids))
alone = fagen.attention(q[:, 100:], k[:, 100:], v[:, 100:], causal=True)
torch.testing.assert_close(packed[:, 100:], alone, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
print("the second document comes out as if it were alone")

print(fagen.explain(q, k, v, causal=True))
