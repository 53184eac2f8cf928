"""What the search has chosen goes into the study as the sampler's own answer.

Optuna's queue of trials to come (`enqueue_trial`) is the study's: of two processes that share it, one would be handed
what the other chose.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from fagen.families import Config


class ChosenSampler(optuna.samplers.BaseSampler):
    """Asks for `choice`, or for what another sampler likes best when there is none."""

    def __init__(self, other: optuna.samplers.BaseSampler) -> None:
        self.other = other
        self.choice: Config | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {} if self.choice else self.other.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {} if self.choice else self.other.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if self.choice:
            return self.choice[param_name]
        return self.other.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.other.before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self.other.after_trial(study, trial, state, values)
