"""The story's steps on the GPU: each is right, the variant with one block a head among them."""

from __future__ import annotations

import json

from fagen.cli import main


def test_the_story_runs(tmp_path):
    out = tmp_path / "ablation.json"
    words = "--head-dim 64 --seqlen 300 --tokens 600 --hidden 256 --rounds 3 --min-time 0.01".split()
    steps = "fa1,skip-tiles,more-blocks,rows-outside,hopper,tuned"
    assert main.main(["ablation", "fa1-fa2-fa3", *words, "--steps", steps, "--out", str(out)]) == 0
    for problem in json.loads(out.read_text())["problems"]:
        outcomes = {name: facts["outcome"] for name, facts in problem["steps"].items()}
        assert outcomes["fa1"] == outcomes["more-blocks"] == outcomes["tuned"] == "ok", outcomes
        assert set(outcomes.values()) <= {"ok", "same", "cannot"}, "what cannot run here is the next GPU's"
