"""From what the user calls a drafter to its checkpoint folder."""

from difflib import get_close_matches
from pathlib import Path

from server.errors import DrafterError

_SHIPPED = Path(__file__).resolve().parent.parent / "drafter" / "checkpoints"


def shipped_drafters(shipped: Path = _SHIPPED) -> list[str]:
    """Names of the checkpoints that come with Slipstream."""
    return sorted(config.parent.name for config in shipped.glob("*/config.json"))


def resolve_drafter(drafter: str, shipped: Path = _SHIPPED) -> Path:
    """The folder of a drafter. Whether it fits the target is told when it is loaded.

    Args:
        drafter: name of a shipped checkpoint, or path of a folder with ``config.json`` and ``model.safetensors``.
        shipped: where shipped checkpoints lie.

    Raises:
        DrafterError: there is no such drafter, or a file of it is missing.
    """
    names = shipped_drafters(shipped)
    folder = shipped / drafter if drafter in names else Path(drafter).expanduser()
    if not folder.is_dir():
        close = get_close_matches(drafter.lower(), names, n=1, cutoff=0.4)
        nearest = f"; nearest: {close[0]}" if close else ""
        raise DrafterError(
            f"unknown drafter {drafter!r}, and no such folder; shipped drafters: {', '.join(names) or 'none'}{nearest}"
            "; to serve without one: --no-speculation.enabled"
        )
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise DrafterError(f"drafter {folder} has no {name}; a drafter is a folder with both of them")
    return folder
