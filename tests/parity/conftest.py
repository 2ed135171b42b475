from __future__ import annotations

from conversion.conftest import make_parts  # noqa: F401 (a fixture)
