"""A kernel before it is built: one config of a family, for a problem, on a target."""

from __future__ import annotations

from dataclasses import dataclass

from fagen import families, ops
from fagen.codegen import render
from fagen.families import Config, Family
from fagen.ops import abi
from fagen.ops.base import Constant, Problem
from fagen.target import Target

Key = tuple[str, str, Target, Config]

_CPP_TYPES = {"fp32": "float", "fp16": "half_t", "bf16": "bfloat_t"}
_hashes: dict[Key, str] = {}


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """Everything that decides a kernel's source. Pickled by its family's name."""

    family: Family
    problem: Problem
    target: Target
    config: Config

    @property
    def key(self) -> Key:
        """All that makes the kernel: of the problem only the static key."""
        return self.family.name, self.problem.static_key, self.target, self.config

    @property
    def suffix(self) -> str:
        return ".cu" if self.target.is_gpu else ".cpp"

    @property
    def rendered(self) -> str:
        """The source, its own headers still included by name. The function that tells the params' layout is its end."""
        op = ops.get(self.problem.op)
        self.family.require(self.problem, self.target, self.config)
        kernel = render.render(
            self.family.template,
            op=op,
            family=self.family,
            problem=self.problem,
            static_key=self.problem.static_key,
            element=_CPP_TYPES[self.problem.dtype],
            arch=self.target.arch,
            config=self.config,
            enums={**op.enums, **self._knob_enums},
            constants=self.constants,
            derived=self.derived,
            **self.family.context(self.problem, self.config),
        )
        return kernel + abi.layout_function(op.header)

    @property
    def source(self) -> str:
        """The self-contained source: it is built, hashed and emitted."""
        return render.fold(self.rendered)

    @property
    def hash(self) -> str:
        """The source hash of today's templates. Computed once a key."""
        key = self.key
        if key not in _hashes:
            _hashes[key] = render.source_hash(self.source)
        return _hashes[key]

    @property
    def derived(self) -> dict[str, int]:
        return self.family.derive(self.problem, self.target, self.config)

    @property
    def constants(self) -> list[Constant]:
        """The constexpr block: what the op says of the problem, then the knobs."""
        rows = [*ops.get(self.problem.op).constants(self.problem)]
        for knob in filter(lambda knob: knob.cpp, self.family.knobs):
            kind, value = knob.literal(self.config[knob.name])
            rows.append((kind, knob.cpp, value, knob.doc.split(";")[0].split(". ")[0]))
        return rows

    @property
    def _knob_enums(self) -> dict[str, list[str]]:
        named = [knob for knob in self.family.knobs if knob.cpp and isinstance(knob.choices[0], str)]
        return {knob.cpp.removeprefix("k"): [str(choice) for choice in knob.choices] for knob in named}

    def _identity(self) -> tuple[str, Problem, Target, Config]:
        return self.family.name, self.problem, self.target, self.config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelSpec) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __reduce__(self) -> tuple:
        return of, self._identity()


def of(family: str, problem: Problem, target: Target, config: Config) -> KernelSpec:
    """The spec of a family that is known by name."""
    return KernelSpec(families.get(family), problem, target, config)
