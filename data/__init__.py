"""Text, tokenizers and folders of weights: what is read from files. Nothing here knows the method."""


def need(package, purpose):
    """An optional package, imported where it is used; ModuleNotFoundError with the command that installs it."""
    try:
        return __import__(package)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{purpose} needs the package {package}: pip install {package}") from None
