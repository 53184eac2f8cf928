"""Many processes, one study: claims are exact, the dead lose nothing, and a database that is not there is said."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path

import pytest

from fagen.cli.main import main
from fagen.errors import FagenError, MissingTool, UsageError
from fagen.families import Config
from fagen.families.space import enumerate_space
from fagen.target import host
from fagen.tuner import address, tune
from fagen.tuner.result import Options
from fagen.tuner.shared import Board, SharedSearch
from tests.support import runs
from tests.support.fake_family import FAMILY, PROBLEM

STUDY = "a study"


@pytest.fixture(scope="module")
def server():
    if not runs.postgres_tool("initdb"):
        pytest.skip("no PostgreSQL server here (apt install postgresql)")
    pytest.importorskip("psycopg", reason="no PostgreSQL driver (pip install 'psycopg[binary]')")
    with runs.postgres() as url:
        yield url


def board(url: str, owner: str, grace: float = 60.0) -> Board:
    return Board(url, owner, grace)


# ---- real processes -------------------------------------------------------------------------------------------------


def claims_of(url: str) -> dict[str, tuple[str, bool]]:
    """Config: owner, and whether it is done; of all studies."""
    import sqlalchemy as sql

    watcher = board(url, "watcher")
    t = watcher._table.c
    with watcher._engine.connect() as connection:
        found = {
            config: (owner, row is not None)
            for config, owner, row in connection.execute(sql.select(t.config, t.owner, t.row))
        }
    watcher.close()
    return found


@pytest.mark.slow
def test_two_processes_share_a_study_and_one_is_killed(calm, server):
    shared = {"storage": server, "grace": 3.0}
    first = runs.begin(calm, name="a", **shared)
    second = runs.begin(calm, name="b", **shared)
    a, b = calm / "a", calm / "b"
    own = lambda folder: [r for r in runs.rows(folder) if r["host"] == owner(folder)]  # noqa: E731
    runs.until(lambda: runs.rows(a) and own(a), first)
    runs.end(first)
    before = own(a)
    orphans = {config for config, (who, done) in claims_of(server).items() if who == owner(a) and not done}
    _, said = second.communicate(timeout=runs.PATIENCE)
    assert second.returncode == 0, said.decode()

    seen = {json.dumps(r["config"], sort_keys=True): r for r in runs.rows(b)}
    assert len(seen) == len(runs.rows(b)) == 8, "nothing lost, nothing repeated"
    assert all(done for _, done in claims_of(server).values())
    for row in before:
        assert seen[json.dumps(row["config"], sort_keys=True)] == row, "what the dead one found is kept"
    for config in orphans:
        assert seen[config]["host"] == owner(b), "what it had in hand is measured by the other"
    (winner,) = winners(b)
    assert winner["config"]["style"] == "plain"

    again = runs.begin(calm, name="a", resume="latest", **shared)
    _, said = again.communicate(timeout=runs.PATIENCE)
    assert again.returncode == 0, said.decode()
    after = {json.dumps(r["config"], sort_keys=True): r for r in runs.rows(a)}
    assert after == seen, "the one that is resumed learns all and measures nothing"
    assert len(runs.rows(a)) == 8
    (winner,) = winners(a)
    assert winner["config"]["style"] == "plain"


def owner(folder: Path) -> str:
    (path,) = folder.glob("*/run.json")
    return json.loads(path.read_text()).get("owner", "")


def winners(folder: Path) -> list[dict]:
    from fagen.tuner import journal

    (path,) = folder.glob(f"*/{journal.WINNERS}")
    return list(journal.read_lines(path))


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    return request.getfixturevalue("server")


def test_a_claim_is_given_once(url):
    boards = [board(url, f"owner{i}") for i in range(4)]
    won: list[list[int]] = [[] for _ in boards]
    start = threading.Barrier(len(boards))

    def grab(index: int) -> None:
        start.wait()
        won[index] = [n for n in range(30) if boards[index].claim(STUDY, f"config {n}", index)]

    threads = [threading.Thread(target=grab, args=(i,)) for i in range(len(boards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(n for part in won for n in part) == list(range(30))
    for b in boards:
        b.close()


def test_who_was_thought_dead_cannot_finish(url):
    slow, quick = board(url, "slow"), board(url, "quick")
    study = "fencing"
    assert slow.claim(study, "x", 1)
    assert not quick.claim(study, "x", 2)
    (claim,) = quick.claims(study)
    slow.beat()
    assert not quick.drop(study, claim), "it lives"
    (claim,) = quick.claims(study)
    assert quick.drop(study, claim)
    assert not quick.drop(study, claim), "for one only"
    assert quick.claim(study, "x", 2)
    assert not slow.finish(study, "x", {"seconds": 1.0})
    assert quick.finish(study, "x", {"seconds": 2.0})
    assert quick.finish(study, "x", {"seconds": 2.0}), "a second try after a lost answer"
    assert quick.row(study, "x") == {"seconds": 2.0}
    assert slow.row(study, "x") == {"seconds": 2.0}
    slow.close()
    quick.close()


# ---- the search -----------------------------------------------------------------------------------------------------


def search(b: Board, name: str = STUDY, **changes) -> SharedSearch:
    wanted = {"seed": 0, "first": [FAMILY.default(PROBLEM, host())], "limit": None, "done": 0, "exhaustive": False}
    return SharedSearch(
        enumerate_space(FAMILY, PROBLEM, host()), b.storage, board=b, name=name, **{**wanted, **changes}
    )


def row(config: Config, seconds: float | None) -> dict:
    good = seconds is not None
    return {
        "problem": PROBLEM.key, "family": FAMILY.name, "config": dict(config), "outcome": "ok" if good else "crash",
        "reason": "", "seconds": seconds, "spread": 0.0 if good else None, "samples": int(good), "error": 0.0,
    }  # fmt: skip


def report(s: SharedSearch, config: Config, seconds: float | None) -> bool:
    if not s.finish(config, row(config, seconds)):
        return False
    s.tell(config, seconds, "failed")
    return True


def hear(s: SharedSearch) -> list[Config]:
    heard = []
    for r in s.news(now=True):
        config = FAMILY.config(r["config"])
        s.tell(config, r["seconds"])
        heard.append(config)
    return heard


def test_two_searches_hand_out_each_config_once(tmp_path):
    boards = [board(f"sqlite:///{tmp_path / 's.db'}", name) for name in "ab"]
    a, b = (search(each, seed=seed) for seed, each in enumerate(boards))
    found = {}
    for turn in range(100):
        mine, other = (a, b) if turn % 2 else (b, a)
        hear(mine)
        config = mine.next()
        if config is not None:
            assert config not in found
            found[config] = 1.0 if config.style == "plain" else None
            assert report(mine, config, found[config])
        elif other.next() is None and not mine.waiting:
            break
    hear(a), hear(b)
    assert found.keys() == set(a.space.legal)
    assert a.seen == b.seen == found
    assert a.best == b.best == 1.0
    assert not a.waiting and not b.waiting
    for each in boards:
        each.close()


@pytest.mark.parametrize("sampler", ["guided", "tpe", "random"])
def test_neither_is_handed_what_the_other_chose(tmp_path, monkeypatch, sampler):
    wanted = [FAMILY.config({"style": "plain", "variant": 3}), FAMILY.config({"style": "slow", "variant": 2})]
    boards = [board(f"sqlite:///{tmp_path / 's.db'}", name) for name in "ab"]
    a, b = (search(each, seed=7, sampler=sampler, first=[one]) for each, one in zip(boards, wanted, strict=True))
    ask, given = b._study.ask, []

    def meanwhile(*arguments):  # between b's choice and its trial
        given.append(a.next())
        monkeypatch.undo()
        return ask(*arguments)

    monkeypatch.setattr(b._study, "ask", meanwhile)
    given.append(b.next())
    assert given == wanted
    assert not a.rejected and not b.rejected
    for each in boards:
        each.close()


def test_the_dead_ones_candidate_comes_back_after_the_grace_time(tmp_path):
    url = f"sqlite:///{tmp_path / 's.db'}"
    dead, alive = board(url, "dead"), board(url, "alive", grace=3600)
    a, b = search(dead), search(alive)
    lost = a.next()
    given = []
    while (config := b.next()) is not None:
        given.append(config)
        report(b, config, 2.0)
    assert lost not in given and len(given) == 13
    hear(b)
    assert b.waiting, "it may yet come"
    assert b.next() is None
    alive.grace = 0.0  # it is over
    hear(b)
    assert b.next() == lost
    assert not report(a, lost, 1.0), "too late"
    assert report(b, lost, 3.0)
    assert hear(a)[-1:] or lost in a.seen
    assert a.seen[lost] == 3.0
    states = [t.state.name for t in b._study.trials if t.params == dict(lost)]
    assert states.count("COMPLETE") == 1 and "RUNNING" not in states
    dead.close()
    alive.close()


def test_what_another_wrote_and_makes_no_sense_is_no_candidate(tmp_path):
    """It counts as failed, so that nobody waits for it; a claim of no config of this search counts as nothing."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    other, mine = board(url, "other"), board(url, "mine")
    b = search(mine)
    legal = sorted(b.space.legal, key=str)
    strange = ["text", [1], {}, row(legal[3], 1.0), {**row(legal[4], 1.0), "seconds": "fast"},
               {**row(legal[5], 1.0), "samples": 0}, {**row(legal[6], 1.0), "family": "another"}]  # fmt: skip
    for config, said in zip(legal[:3] + [legal[2 + 5]] + legal[4:7], strange, strict=True):
        assert other.publish(STUDY, config.to_json(), said)
    for number, claim in enumerate(["[", "[1]", '{"style": "none", "variant": 1}', "[" * 100_000]):
        assert other.claim(STUDY, claim, 100 + number)
    assert b.news(now=True) == []
    assert set(b.seen.values()) == {None} and len(b.seen) == len(strange)
    assert not b.waiting
    assert b.next() not in b.seen
    other.close()
    mine.close()


def test_what_was_claimed_and_not_measured_is_given_back(tmp_path):
    url = f"sqlite:///{tmp_path / 's.db'}"
    one, two = board(url, "one"), board(url, "two")
    a, b = search(one), search(two)
    held = [a.next(), a.next()]
    assert not {b.next(), b.next()} & set(held)
    a.close()
    hear(b)
    rest = set()
    while (config := b.next()) is not None:
        rest.add(config)
    assert set(held) <= rest
    # and a run that was killed takes back its own at once when it is resumed
    again = search(board(url, "two"))
    assert {again.next() for _ in range(14)} == set(a.space.legal)


def test_limits_are_each_processes_own(tmp_path):
    url = f"sqlite:///{tmp_path / 's.db'}"
    a, b = (search(board(url, name), limit=3) for name in "ab")
    assert len(list(iter(a.next, None))) == 3
    assert len(list(iter(b.next, None))) == 3
    assert a.next() is None


# ---- what cannot be done --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("postgresql+psycopg://me:hush@127.0.0.1:1/none", FagenError, "cannot be used"),
        ("sqlite:////nowhere/at/all/study.db", FagenError, "cannot be used"),
        ("no url", UsageError, "no URL of a database"),
        ("oracle9://me:hush@there/x", UsageError, "unknown kind of database"),
        ("oracle9://there/x?password=hush", UsageError, "unknown kind of database"),
        ("postgresql+psycopg://me@127.0.0.1:1/none?password=hush&sslpassword=hush", FagenError, "cannot be used"),
        ("postgresql+psycopg://me@127.0.0.1:1/none?secret=hush", FagenError, "cannot be used"),
        ("host=there password=hush", UsageError, "no URL of a database"),
        ("password=hush://there", UsageError, "no URL of a database"),
        ("postgresql://me@there:hush/x?password=hush", UsageError, "no URL of a database"),
    ],
)
def test_a_storage_that_cannot_be_used_is_said_and_nothing_is_begun(calm, address, error, said):
    if "psycopg" in address:
        pytest.importorskip("psycopg", reason="no PostgreSQL driver (pip install 'psycopg[binary]')")
    options = Options(trials=2, runs=calm / "runs", storage=address)
    with pytest.raises(error, match=said) as caught:
        tune.run([PROBLEM], host(), options)
    assert "hush" not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert not (calm / "runs").exists()


def test_of_a_storages_url_only_what_is_no_secret_is_shown():
    from sqlalchemy.engine import make_url

    url = "postgresql://me:hush1@there:5/x?host=a&host=b&sslmode=require&password=hush2&passfile=/hush3&options=-hush4"
    shown = address.shown(make_url(url))
    assert "hush" not in shown
    for part in ("me:***@there:5/x", "host=a&host=b", "sslmode=require", "password=***", "passfile=***", "options=***"):
        assert part in shown


def test_a_simulation_takes_no_storage(tmp_path, capsys):
    """Its --json repeats the command line, where a password would be."""
    command = ["tune", "--simulate", str(tmp_path), "--storage", "postgresql://me:hush@there/x", "--json"]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert "--storage" in err and "hush" not in out + err


def test_a_wrong_password_is_said(server):
    with pytest.raises(FagenError, match="password authentication failed") as caught:
        board(server.replace("sesame", "says-me"), "x")
    assert "says-me" not in str(caught.value)


def test_a_missing_driver_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "p" in name[:2] else find(name))
    with pytest.raises(MissingTool, match=r"fagen\[postgres\]"):
        board("postgres://me@nowhere/x", "x")


def test_a_server_that_goes_away_ends_the_run_and_it_can_be_resumed(calm, server, monkeypatch):
    """A connection that breaks is opened again; a server that stays away is an error after some tries."""
    from fagen.tuner import shared

    monkeypatch.setattr(shared, "_PATIENCE", (0.05, 0.05))
    b = board(server, "cut")
    import sqlalchemy as sql

    ended = []

    def cut() -> None:
        with b._engine.begin() as connection:
            ended.append(connection.execute(sql.text("select pg_backend_pid()")).scalar())
        other = board(server, "other")
        with other._engine.begin() as connection:
            connection.execute(sql.text(f"select pg_terminate_backend({ended[-1]})"))
        other.close()

    cut()
    assert b.claim("cut", "x", 1), "the connection was opened again"
    b._engine.dispose()
    monkeypatch.setattr(b, "_engine", sql.create_engine("postgresql+psycopg://me@127.0.0.1:1/none"))
    with pytest.raises(FagenError, match="cannot be used"):
        b.claim("cut", "y", 1)
