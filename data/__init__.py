"""What is read: texts, tokenizers, checkpoint formats, and the embedded model in tiny/."""
from types import ModuleType


def need(package: str, purpose: str) -> ModuleType:
    """Import an optional package. Raises ModuleNotFoundError with the command that installs it."""
    try:
        return __import__(package)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{purpose} needs the package {package}: pip install {package}") from None
