"""The URL of a shared study's database: its driver, how to connect, and what of it people may see."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from fagen.errors import MissingTool, UsageError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

CONNECT_SECONDS = 10
_DRIVERS = ("psycopg", "psycopg2", "pg8000")  # for PostgreSQL, the first that is installed
_HARMLESS = ("host", "port", "user", "dbname", "service", "sslmode", "connect_timeout", "application_name")
_DRIVER_REMEDY = "pip install 'fagen[postgres]'"


def parse(url: str) -> tuple[URL, dict[str, Any]]:
    """The URL with a driver that is installed, and how to connect quickly or not at all."""
    from sqlalchemy import exc
    from sqlalchemy.engine import make_url

    try:
        address = make_url(url)
        kind, _, driver = address.drivername.partition("+")
        if kind in ("postgresql", "postgres"):
            driver = driver or next((name for name in _DRIVERS if importlib.util.find_spec(name)), "")
            if not driver:
                what = f"no PostgreSQL driver is installed ({', '.join(_DRIVERS)})"
                raise MissingTool("--storage needs a driver for its database", what, _DRIVER_REMEDY)
            address = address.set(drivername=f"postgresql+{driver}")
        address.get_dialect().import_dbapi()
    except exc.NoSuchModuleError as error:
        raise UsageError(
            f"--storage: unknown kind of database {address.drivername!r}", "known: postgresql, sqlite"
        ) from error
    except (exc.ArgumentError, ValueError) as error:
        what = f"--storage {_hidden(url)} is no URL of a database"
        raise UsageError(what, remedy="one is like postgresql://user:password@host/database") from error
    except ImportError as error:
        raise MissingTool(f"--storage needs a driver for {address.drivername}", str(error), _DRIVER_REMEDY) from error
    utf8 = {"client_encoding": "utf8"}  # whatever the database was made with
    how: dict[str, dict[str, Any]] = {
        "psycopg": {"connect_timeout": CONNECT_SECONDS, **utf8},
        "psycopg2": {"connect_timeout": CONNECT_SECONDS, **utf8},
        "pg8000": {"timeout": CONNECT_SECONDS},
        "pysqlite": {"timeout": CONNECT_SECONDS},
    }
    return address, how.get(address.get_driver_name(), {})


def shown(address: URL) -> str:
    """With the settings that are known to hold no secret, and the names of the others."""
    query = {name: value if name in _HARMLESS else "***" for name, value in address.query.items()}
    return address.set(query=query).render_as_string(hide_password=True).replace("%2A", "*")


def secrets(address: URL) -> list[str]:
    """What an error of a driver may repeat, and a person must not see; the longest first."""
    found = [str(address.password or "")]
    for name, value in address.query.items():
        if name not in _HARMLESS:
            found += [value] if isinstance(value, str) else value
    return sorted(filter(None, found), key=len, reverse=True)


def _hidden(url: str) -> str:
    """No more than its kind of what may be a URL: where a password stands in the rest is not known."""
    kind, mark, _ = url.partition("://")
    return f"{kind}://***" if mark and kind.replace("+", "").isalnum() else "***"
