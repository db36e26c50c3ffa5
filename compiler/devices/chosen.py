"""Which device to compute on."""

from __future__ import annotations

import torch

from ..support.errors import CompilerError, first_line
from ..support.setting_checks import refuse

#: The accelerator of the machine, where it has one.
AUTO = "auto"


def check_device(device: object) -> None:
    """Raise CompilerError unless a setting says a device that can be used here: ``"auto"``, None, or one of torch's."""
    if device is None or device == AUTO:
        return
    if not isinstance(device, (str, torch.device)):
        refuse("device", device, "'auto', a name such as 'cuda:0', or a torch.device")
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("tensors there have no numbers")
        torch.zeros((), device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as cause:
        raise CompilerError(
            f"device {str(device)!r} cannot be used: {first_line(cause)}",
            expected="'auto', or a device that torch can use on this machine",
            hint="leave device out: everything then runs where the network is",
        ) from cause


def chosen_device(asked: str | torch.device | None, home: torch.device) -> torch.device:
    """The device that a setting says, by its full name; `home` where it says none, and where ``"auto"`` finds none.

    Arguments:
        asked: What `check_device` has let pass.
        home: Where the network is.

    Returns:
        The device, with its number where it has several.

    Example:
        >>> from foldcut.compiler.devices.chosen import chosen_device
        >>> chosen_device(None, torch.device("cpu"))
        device(type='cpu')
    """
    if asked is None:
        return home
    if asked == AUTO:
        found = torch.accelerator.current_accelerator(check_available=True)
        return home if found is None else torch.zeros((), device=found).device
    return torch.zeros((), device=asked).device
