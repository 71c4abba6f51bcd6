"""`python -m deploy.edge_app.health`: is the app at work? Its health file says when it answered the last frame.

The file is JSON, written as a whole once a second: `time` (when it was written), `last_frame` (when a frame was
answered last, null before the first), both UTC in ISO 8601; `state`, "running" or "waiting" for a source that is
gone; `frames`, `failed`, `dropped`; `frames_per_s`, of the last ten seconds; `median_ms`, `last_ms`; `label`,
`probability`; `source`, `model`, `engine`.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m deploy.edge_app.health")

import json
from collections.abc import Sequence
from datetime import datetime, timezone

from runtime import command
from runtime.errors import FileError, OptionError
from runtime.files import read_bytes

EXAMPLES = """
  python -m deploy.edge_app.health /run/clearpact/health.json
  python -m deploy.edge_app.health /run/clearpact/health.json --max-age 60
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print when the app answered its last frame; status 0 where that is recent, 2 otherwise."""
    parser = command.parser("deploy.edge_app.health", "Tell whether deploy.edge_app is at work.", EXAMPLES)
    parser.add_argument("file", help="what the app was given as --health")
    parser.add_argument("--max-age", type=float, default=30, metavar="SECONDS",
                        help="how old the last answer may be (default: 30)")  # fmt: skip
    options = parser.parse_args(argv)
    if not options.max_age > 0:
        raise OptionError(f"--max-age {options.max_age:g}: expected a number above 0")
    last = last_frame(read_bytes(options.file), options.file)
    if last is None:
        raise FileError(f"{options.file}: no frame was answered yet; see what the app prints")
    age_s = (datetime.now(timezone.utc) - last).total_seconds()
    if age_s > options.max_age:
        raise FileError(
            f"{options.file}: the last frame was answered {age_s:.0f} s ago, expected at most "
            f"{options.max_age:g}; see what the app prints"
        )
    print(f"the last frame was answered {age_s:.1f} s ago")
    return 0


def last_frame(content: bytes, name: str) -> datetime | None:
    """Return when a frame was answered last, None where none was.

    Args:
        content: of the health file.
        name: of the file, for errors.

    Raises:
        FileError: it is not such a file.
    """
    try:
        text = json.loads(content)["last_frame"]
        # "+00:00" rather than "Z", which Python 3.10 does not read.
        return None if text is None else datetime.fromisoformat(text).astimezone(timezone.utc)
    except (ValueError, KeyError, TypeError):
        raise FileError(f"{name}: no health file, expected JSON with last_frame; name what --health got") from None


if __name__ == "__main__":
    command.run(main)
