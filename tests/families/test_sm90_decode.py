"""What Python knows of Hopper's decode families: how keys of a plan are divided, what configs should cost."""

from __future__ import annotations

from fagen.families import sm80_decode, sm90_decode, sm90_decode_mla
from fagen.ops.attention.decode import DecodeProblem
from fagen.target import known

SM90 = known("sm_90")
PROBLEM = DecodeProblem(head_dim=128, mask="causal", page=16, batch=32, heads=32, kv_heads=8, seqlen_k=4096)


def test_hopper_divides_keys_by_the_same_rule() -> None:
    """A plan for lengths of all sizes: blocks of the families for Hopper get about as many keys."""
    lengths = [60000, 300, 1500, 128, 9000, 33000]
    latent = DecodeProblem(
        head_dim=576, head_dim_v=512, shared_kv=True, page=64, heads=128, kv_heads=1, batch=6, seqlen_k=65536
    )
    for family, problem in ((sm90_decode_mla.FAMILY, latent), (sm90_decode.FAMILY, PROBLEM.replace(batch=6))):
        problem = problem.replace(seqlen_k=65536)
        keys = family.split_keys(problem, SM90, family.default(problem, SM90), lengths)
        assert 128 <= keys < 8192 and keys % 64 == 0
        assert family.split_keys(problem, SM90, family.default(problem, SM90), [0] * 6) >= 65536


def test_costs_of_hopper_order_what_should_differ() -> None:
    def cost(problem: DecodeProblem, **changes: object) -> float:
        config = sm90_decode.FAMILY.config({**sm90_decode.FAMILY.default(problem, SM90), **changes})  # type: ignore[dict-item]
        return sm90_decode.cost(problem, SM90, config)

    prompts = PROBLEM.replace(seqlen_q=2048, page=64)
    assert cost(prompts) < cost(prompts, tile_m=64)  # keys are read twice as often
    wide = DecodeProblem(head_dim=256, page=16, batch=32, heads=16, kv_heads=1, seqlen_k=4096)
    assert cost(wide) < cost(wide, stages=2) < cost(wide, stages=2, tile_n=32)  # less on its way
    assert cost(PROBLEM) < cost(PROBLEM, blocks_per_sm=1, stages=2)
    least = wide.bytes() / (sm80_decode.SM_RATE * SM90.units)
    assert least < cost(wide) < 2 * least
