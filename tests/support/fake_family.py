"""A family of naive C++ kernels, most of which misbehave, to test the tuner with. Workers import it by its handlers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import jinja2

from fagen import families
from fagen.codegen import render
from fagen.errors import FagenError
from fagen.families import Config, Constraint, Family, Knob
from fagen.ops.attention.problem import Problem
from fagen.target import Target, host
from fagen.tuner import evaluate, final_round
from fagen.tuner.messages import Probe

STYLES = ("plain", "slow", "segfault", "hang", "wrong", "holes", "late", "overrun", "scribble", "broken")
# what becomes of each, and a word of the reason
ENDS = {
    "segfault": ("crash", "SIGSEGV"),
    "hang": ("timeout", "no answer within"),
    "wrong": ("wrong", "error"),
    "holes": ("wrong", "not written"),
    "late": ("wrong", "sample of batch 0 head"),
    "overrun": ("wrong", "wrote outside of out"),
    "scribble": ("wrong", "wrote into its input k"),
    "broken": ("compile", "meant not to compile"),
}

_SOURCE = r"""{% include "preamble.j2" %}
#include "fagen/abi/forward.h"
#include <math.h>
#include <signal.h>
#include <unistd.h>
#include <vector>

static_assert(Config::kStyle != Style::broken, "this one is meant not to compile");

static void run(const fagen_forward_params& p) {
  const float *q = (const float*)p.q.data, *k = (const float*)p.k.data, *v = (const float*)p.v.data;
  float* o = (float*)p.o.data;
  std::vector<float> s(p.seqlen_k), acc(p.head_dim_v);
  for (int b = 0; b < p.batch; b++)
    for (int h = 0; h < p.heads; h++)
      for (int i = 0; i < p.seqlen_q; i++) {
        int g = h / (p.heads / p.kv_heads), diagonal = i + p.seqlen_k - p.seqlen_q;
        int end = p.window_right >= 0 ? diagonal + p.window_right + 1 : p.seqlen_k;
        if (end > p.seqlen_k) end = p.seqlen_k;
        float top = -INFINITY, sum = 0;
        const float* qi = q + b * p.q.stride[0] + i * p.q.stride[1] + h * p.q.stride[2];
        for (int j = 0; j < end; j++) {
          const float* kj = k + b * p.k.stride[0] + j * p.k.stride[1] + g * p.k.stride[2];
          float dot = 0;
          for (int d = 0; d < p.head_dim; d++) dot += qi[d] * kj[d];
          s[j] = dot * p.scale;
          top = fmaxf(top, s[j]);
        }
        for (auto& a : acc) a = 0;
        for (int j = 0; j < end; j++) {
          const float* vj = v + b * p.v.stride[0] + j * p.v.stride[1] + g * p.v.stride[2];
          float w = expf(s[j] - top);
          sum += w;
          for (int d = 0; d < p.head_dim_v; d++) acc[d] += w * vj[d];
        }
        if (Config::kStyle == Style::holes && i == p.seqlen_q - 1 && p.batch == 3) continue;
        float* oi = o + b * p.o.stride[0] + i * p.o.stride[1] + h * p.o.stride[2];
        for (int d = 0; d < p.head_dim_v; d++) oi[d] = sum > 0 ? acc[d] / sum : 0;
        if (Config::kStyle == Style::wrong) oi[0] *= 1.01f;
        if (Config::kStyle == Style::late && p.batch == 3 && i == 0) oi[0] += 0.1f;
        if (p.lse) p.lse[(b * p.heads + h) * p.seqlen_q + i] = sum > 0 ? top + logf(sum) : -INFINITY;
      }
}

extern "C" int fagen_launch(const fagen_forward_params* p, void*) {
  if (Config::kStyle == Style::segfault) *(volatile int*)8 = 1;
  volatile bool forever = true;
  if (Config::kStyle == Style::hang) {  // and deaf to all signals that can be blocked
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
  }
  while (Config::kStyle == Style::hang && forever) usleep(1000);  // others need the core
  int repeats = Config::kStyle == Style::slow ? 4 : 1;
  for (int r = 0; r < repeats; r++) run(*p);
  if (Config::kStyle == Style::overrun) ((float*)p->o.data)[p->batch * p->o.stride[0]] = 0;
  if (Config::kStyle == Style::scribble) ((float*)p->k.data)[0] += 1;
  return 0;
}
extern "C" const char* fagen_error(int) { return ""; }
extern "C" uint64_t fagen_workspace_bytes(const fagen_forward_params*) { return 0; }
"""


# FAKE_STYLES: fewer of them are legal
CHOSEN = tuple(os.environ.get("FAKE_STYLES", ",".join(STYLES)).split(","))


def _alone(problem: Problem, target: Target, config: Config) -> str | None:
    if config.style not in CHOSEN:
        return f"{config.style} is not chosen"
    if config.style not in ("plain", "slow") and config.variant > 1:
        return f"one {config.style} is enough, variant={config.variant}"
    return None


FAMILY = Family(
    name="fake_forward",
    template="fake/forward.cpp.j2",
    op="forward",
    dtypes=("fp32",),
    knobs=(
        Knob("style", "kStyle", STYLES, "how it behaves"),
        Knob("variant", "kVariant", (1, 2, 3), "nothing but another source"),
    ),
    constraints=(Constraint("alone", _alone),),
    supports=lambda p, t: None if p.dtype == "fp32" else "serves fp32",
    derive=lambda p, t, c: {"variant": int(c.variant)},
    default=lambda p, t: Config({"style": "slow", "variant": 1}),
    flags=lambda t: ("-O2",),
    resources=lambda p, t, c: (c.variant,),
)
PROBLEM = Problem(dtype="fp32", head_dim=16, mask="causal", batch=3, heads=2, kv_heads=1, seqlen_q=192)


def _all_families() -> tuple[Family, ...]:
    return (FAMILY,)


def install(put=setattr) -> None:
    """`put` is monkeypatch.setattr in the process of the tests."""
    loader = render._environment().loader
    ours = jinja2.DictLoader({FAMILY.template: _SOURCE})
    put(render._environment(), "loader", jinja2.ChoiceLoader([ours, loader]))
    put(families, "all_families", _all_families)
    put(evaluate, "compile_one", compile_one)
    put(evaluate, "measure_any", measure_any)
    put(final_round, "SECONDS", 0.3)  # the right ones are a factor apart


_compile_one, _measure_any = evaluate.compile_one, evaluate.measure_any


def compile_one(request):
    """FAKE_COLD: seconds that it takes longer."""
    time.sleep(float(os.environ.get("FAKE_COLD", "0")))
    return _compile_one(request)


def measure_any(request):
    """FAKE_PACE: seconds that it takes longer. FAKE_BROKEN: a file that names a device which does not work."""
    broken = Path(os.environ.get("FAKE_BROKEN", "/nowhere"))
    if isinstance(request, Probe) and broken.exists() and str(request.device) == broken.read_text():
        raise RuntimeError("the device is in a bad mood")
    time.sleep(0.0 if isinstance(request, Probe) else float(os.environ.get("FAKE_PACE", "0")))
    return _measure_any(request)


def misbehave(request: str) -> str:
    """A handler for tests of the worker alone."""
    if request == "raise":
        raise ValueError(request)
    if request == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if request == "exit":
        os._exit(7)
    if request == "sleep":
        time.sleep(3600)
    print("said on stdout", flush=True)
    return request


def main(runs: str, out: str, trials: int) -> int:
    """A run in a process of its own, for tests that kill it. FAKE_OPTIONS: more options, as JSON."""
    from fagen.tuner import progress, tune
    from fagen.tuner.result import Options

    install()
    options = {"trials": trials, "runs": Path(runs), "out": Path(out), "run_timeout": 60.0, "workers": 2}
    options = Options(**options, **json.loads(os.environ.get("FAKE_OPTIONS", "{}")))
    try:
        return tune.run([PROBLEM], host(), options, progress.make()).exit_code
    except FagenError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if multiprocessing.current_process().name != "MainProcess":  # a worker of the tuner: it unpickles specs of this family
    install()

if __name__ == "__main__":
    from tests.support import fake_family

    raise SystemExit(fake_family.main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
