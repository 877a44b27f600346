"""Texts to show, whatever a name holds."""


def printable(text: str) -> str:
    """Control characters, and bytes of a name that is no text, as escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
