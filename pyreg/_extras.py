"""What a front end says where its framework is missing."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs(extra: str, *packages: str) -> Iterator[None]:
    """Imports inside this need these packages, which an extra of pyreg's installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        message = f'{error.name} is not installed; wanted pyreg with it: pip install "pyreg[{extra}]"'
        raise ModuleNotFoundError(message, name=error.name) from None
