"""One study for many processes on any number of hosts, in a database that all of them reach.

Optuna's tables hold the trials that the samplers learn from. One table of ours holds a row a candidate: who claimed
it, whether its owner still lives, and what became of it. Its primary key is what makes a claim exact: of any number of
processes that want the same candidate, one can insert the row. An owner counts up its rows' `beat` while it works; a
row whose beat stands still for the grace time belongs to a process that died, and whoever removes it first may measure
the candidate. No clock is compared between hosts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fagen.errors import FagenError
from fagen.families import Config
from fagen.tuner import address, resumed
from fagen.tuner.search import Search

if TYPE_CHECKING:
    import optuna

EVERY = 1.0  # seconds between looks at what the others did
GRACE = 60.0  # seconds without a beat after which an owner counts as dead
_PATIENCE = (1.0, 2.0, 4.0, 8.0)  # seconds between tries to reach a database that was there before

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """A candidate's row: `trial` is Optuna's of the owner; done when it has an outcome."""

    config: str
    owner: str
    beat: int
    trial: int
    done: bool


class Board:
    """The storage of a shared study, open. `owner` names this run, now and when it is resumed."""

    def __init__(self, url: str, owner: str, grace: float = GRACE) -> None:
        import optuna
        import sqlalchemy as sql

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.owner, self.grace = owner, grace
        where, connect = address.parse(url)
        self.shown, self._secrets = address.shown(where), address.secrets(where)
        options: dict[str, Any] = {"connect_args": connect, "pool_pre_ping": True}
        self._engine = sql.create_engine(where, **options)
        text = sql.Text
        self._table = sql.Table(
            "fagen_candidates", sql.MetaData(), sql.Column("id", sql.String(64), primary_key=True),
            sql.Column("study", sql.String(64), index=True), sql.Column("config", text), sql.Column("owner", text),
            sql.Column("beat", sql.Integer), sql.Column("trial", sql.Integer), sql.Column("row", text),
        )  # fmt: skip
        try:
            with self._engine.connect():
                pass
        except sql.exc.SQLAlchemyError as error:
            raise self._unreachable(error) from error
        self.storage: optuna.storages.BaseStorage = self._made(
            lambda: optuna.storages.RDBStorage(where.render_as_string(hide_password=False), engine_kwargs=options)
        )
        self._made(lambda: self._table.metadata.create_all(self._engine))

    def _made(self, make: Callable[[], T]) -> T:
        """Tables that several processes may be making at once: the one that comes second finds them made."""
        import optuna
        import sqlalchemy as sql

        for seconds in (0.2, 0.5, 1.0, None):
            try:
                return make()
            except (sql.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
                if seconds is None or isinstance(error, RuntimeError):  # tables of another version of Optuna
                    raise self._unreachable(error) from error
                time.sleep(seconds)
        raise AssertionError

    def _unreachable(self, error: Exception) -> FagenError:
        cause = str(getattr(error, "orig", None) or error.__cause__ or error).strip()
        for secret in self._secrets:
            cause = cause.replace(secret, "***")
        why = " ".join(cause.split())[:300]
        return FagenError(
            f"storage {self.shown} cannot be used", why, "is the server running, and are host, user and password right?"
        )

    def patiently(self, act: Callable[[], T]) -> T:
        """A database that was there may be away for some seconds."""
        import optuna
        import sqlalchemy as sql

        for seconds in (*_PATIENCE, None):
            try:
                return act()
            except (sql.exc.DBAPIError, optuna.exceptions.StorageInternalError) as error:
                if seconds is None:
                    raise self._unreachable(error) from error
                time.sleep(seconds)
        raise AssertionError

    def _change(self, statement: Any) -> int:
        """Rows that it changed."""

        def act() -> int:
            with self._engine.begin() as connection:
                return connection.execute(statement).rowcount

        return self.patiently(act)

    # ---- candidates ---------------------------------------------------------------------------------------------

    def _insert(self, study: str, config: str, trial: int, row: str | None) -> bool:
        import sqlalchemy as sql

        values = {"id": _hash(study + config), "study": _hash(study), "config": config, "owner": self.owner}
        statement = self._table.insert().values(**values, beat=0, trial=trial, row=row)

        def act() -> bool:
            try:
                with self._engine.begin() as connection:
                    connection.execute(statement)
            except sql.exc.IntegrityError:
                with self._engine.connect() as connection:  # ours, if only the answer to an earlier try was lost
                    mine = sql.select(self._table.c.id).where(
                        self._table.c.id == values["id"],
                        self._table.c.owner == self.owner,
                        self._table.c.trial == trial,
                    )
                    return connection.execute(mine).first() is not None
            return True

        return self.patiently(act)

    def claim(self, study: str, config: str, trial: int) -> bool:
        """Whether this process is the one to measure it."""
        return self._insert(study, config, trial, None)

    def publish(self, study: str, config: str, row: dict[str, Any]) -> bool:
        """What is known already, unless somebody else has it in hand."""
        return self._insert(study, config, -1, json.dumps(row))

    def finish(self, study: str, config: str, row: dict[str, Any]) -> bool:
        """What became of it. False if this process was thought dead and another took its place."""
        t = self._table.c
        mine = self._table.update().where(t.id == _hash(study + config), t.owner == self.owner, t.row.is_(None))
        if self._change(mine.values(row=json.dumps(row))):
            return True
        return self._row(study, config) == row  # the answer to an earlier try was lost

    def beat(self) -> None:
        t = self._table.c
        self._change(self._table.update().where(t.owner == self.owner, t.row.is_(None)).values(beat=t.beat + 1))

    def drop(self, study: str, claim: Claim) -> bool:
        """Remove a claim that is not done and has not changed since it was read. True for one process only."""
        t = self._table.c
        same = (t.id == _hash(study + claim.config), t.owner == claim.owner, t.beat == claim.beat)
        return self._change(self._table.delete().where(*same, t.row.is_(None))) == 1

    def claims(self, study: str) -> list[Claim]:
        import sqlalchemy as sql

        t = self._table.c
        query = sql.select(t.config, t.owner, t.beat, t.trial, t.row.is_not(None)).where(t.study == _hash(study))

        def act() -> list[Claim]:
            with self._engine.connect() as connection:
                return [Claim(config, *facts) for config, *facts in connection.execute(query)]

        return self.patiently(act)

    def _row(self, study: str, config: str) -> Any:
        """As it was written; None if that is no JSON."""
        import sqlalchemy as sql

        query = sql.select(self._table.c.row).where(self._table.c.id == _hash(study + config))

        def act() -> str:
            with self._engine.connect() as connection:
                return connection.execute(query).scalar() or "null"

        try:
            return json.loads(self.patiently(act))
        except (ValueError, RecursionError):
            return None

    row = _row

    def fail(self, trial: int) -> None:
        """A trial of Optuna's that nobody will finish."""
        import optuna

        with contextlib.suppress(KeyError, RuntimeError, ValueError):  # finished, or never there
            state = optuna.trial.TrialState.FAIL
            self.patiently(lambda: self.storage.set_trial_state_values(trial, state))

    def close(self) -> None:
        self._engine.dispose()
        with contextlib.suppress(Exception):
            self.storage.remove_session()


class SharedSearch(Search):
    """A search that hands out only what this process could claim, and learns what others found."""

    def __init__(self, *arguments: Any, board: Board, name: str, limit: int | None, done: int, **named: Any) -> None:
        """`limit` candidates of its own, `done` of which were measured before this run was resumed."""
        self._board, self._name, self._most, self._done = board, name, limit, done
        self._mine: dict[Config, int] = {}  # in flight here, with Optuna's number
        self._watched: dict[str, tuple[Claim, float]] = {}  # others' claims, and since when they have not changed
        self._due = 0.0
        board.patiently(lambda: super(SharedSearch, self).__init__(*arguments, limit=None, name=name, **named))
        for claim in board.claims(name):
            if claim.owner == board.owner and not claim.done and board.drop(name, claim):
                board.fail(claim.trial)  # of this run, before it was killed

    @property
    def _full(self) -> bool:
        return self._most is not None and self._done >= self._most

    @property
    def waiting(self) -> bool:
        """Whether others have in hand what may yet come back; once this one has done its part, what must be."""
        elsewhere = [config for config, trials in self._flight.items() if not trials]
        return any(config in elsewhere for config in self._musts) if self._full else bool(elsewhere)

    def next(self) -> Config | None:
        while not self._full:
            config = self._board.patiently(super().next)
            if config is None:
                return None
            trials = self._flight[config]
            if self._board.claim(self._name, config.to_json(), trials[0]._trial_id):
                self._mine[config] = trials[0]._trial_id
                self._done += 1
                return config
            self._forget(config)
        return None

    def _forget(self, config: Config) -> None:
        """It is somebody else's: an empty list of trials in flight, until `news` has the outcome."""
        for trial in self._flight.get(config, []):
            self._board.fail(trial._trial_id)
        self._flight[config] = []
        self._mine.pop(config, None)

    def finish(self, config: Config, row: dict[str, Any]) -> bool:
        """Tell the others first. False: this process was thought dead, and the outcome will come from elsewhere."""
        if self._board.finish(self._name, config.to_json(), row):
            return True
        self._forget(config)
        self._done -= 1
        return False

    def known(self, config: Config, seconds: float | None) -> None:
        if config in self._legal and config not in self.seen:
            self._note(config, seconds)

    def publish(self, rows: Mapping[Config, dict[str, Any]]) -> None:
        """What this run has measured that the others do not know, as when it was begun without them."""
        there = {claim.config for claim in self._board.claims(self._name)}
        for config, row in rows.items():
            if config.to_json() not in there and self._board.publish(self._name, config.to_json(), row):
                self.seen.pop(config, None)
                self._board.patiently(functools.partial(super().known, config, row["seconds"]))

    def tell(self, config: Config, seconds: float | None, reason: str = "") -> None:
        import optuna

        for trial in self._flight.pop(config, []):
            with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):  # told, the answer lost
                if seconds is None:
                    self._board.patiently(functools.partial(self._prune, trial, reason))
                else:
                    self._board.patiently(functools.partial(self._study.tell, trial, seconds))
        self._mine.pop(config, None)
        self._note(config, seconds)

    def news(self, *, now: bool = False) -> list[dict[str, Any]]:
        """Outcomes of others since the last look, as lines of trials.jsonl. Shows that this process lives."""
        if not now and time.monotonic() < self._due:
            return []
        self._due = time.monotonic() + EVERY
        if self._mine:
            self._board.beat()
        rows, there = [], set()
        for claim in self._board.claims(self._name):
            config = self._config(claim)
            if config is None:
                continue
            there.add(config)
            if config in self.seen or config in self._mine:
                continue
            if claim.done:
                row = self._board.row(self._name, claim.config)
                if resumed.is_candidate(row, self.space.family) and row["config"] == dict(config):
                    rows.append(row)
                else:
                    self.tell(config, None, "what its owner wrote of it cannot be understood")
            elif not self._gone(claim, config):
                self._flight.setdefault(config, [])
        for config in [c for c, trials in self._flight.items() if not trials and c not in there]:
            del self._flight[config]  # given back by its owner
        return rows

    def _config(self, claim: Claim) -> Config | None:
        """A claim's config, None if this search has no such."""
        with contextlib.suppress(
            ValueError, AttributeError, RecursionError, FagenError
        ):  # not JSON, no object, no knobs
            config = self.space.family.config(json.loads(claim.config))
            return config if config in self._legal else None
        return None

    def _gone(self, claim: Claim, config: Config) -> bool:
        """Whether its owner is dead, and the candidate free again; this process will ask for it next."""
        held, since = self._watched.get(claim.config, (None, 0.0))
        if held != claim:
            self._watched[claim.config] = claim, time.monotonic()
            return False
        if time.monotonic() - since < self._board.grace or not self._board.drop(self._name, claim):
            return False
        self._board.fail(claim.trial)
        self._flight.pop(config, None)
        self._queue = itertools.chain([config], self._queue)
        return True

    def close(self) -> None:
        """Give back what was claimed and not measured."""
        for claim in self._board.claims(self._name) if self._mine else []:
            if claim.owner == self._board.owner and not claim.done and self._board.drop(self._name, claim):
                self._board.fail(claim.trial)
        self._mine.clear()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
