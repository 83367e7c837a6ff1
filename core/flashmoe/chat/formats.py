"""Regexes of the values of JSON schema's keyword `format`, in the common syntax of all engines.

A schema library checks formats only if it is asked to, and llguidance lets some of them go on for
ever (the fraction of a second, the digits of a duration). So the regexes are flashmoe's own: they
bound the length, and the grammar and the check afterwards agree. As far as a regex can tell: 30
February is refused, 29 February of any year is not.
"""

from __future__ import annotations

_DAY = (
    "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|[12][0-9]))"
)
_DATE = f"[0-9]{{4}}-{_DAY}"
_HOUR = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR}:([0-5][0-9]|60)(\\.[0-9]{{1,9}})?([Zz]|[+-]{_HOUR})"
_N = "[0-9]{1,9}"
_CLOCK = f"T({_N}H({_N}M({_N}S)?)?|{_N}M({_N}S)?|{_N}S)"
_DURATION = f"P({_N}W|({_N}Y({_N}M({_N}D)?)?|{_N}M({_N}D)?|{_N}D)({_CLOCK})?|{_CLOCK})"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = f"{_BYTE}(\\.{_BYTE}){{3}}"
_H = "[0-9A-Fa-f]{1,4}"
_IPV6 = "|".join(
    [f"({_H}:){{7}}{_H}", f"({_H}:){{1,7}}:"]
    + [f"({_H}:){{1,{7 - n}}}(:{_H}){{1,{n}}}" for n in range(1, 7)]
    + [f":(:{_H}){{1,7}}", "::"]
)
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOSTNAME = f"{_LABEL}(\\.{_LABEL}){{0,7}}"
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}"
_URI = "[A-Za-z][A-Za-z0-9+.-]{0,30}:[A-Za-z0-9._~:/?#@!$&'()*+,;=%\\[\\]-]{1,2000}"

#: The regex of the whole text, by the name of the format.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": _DURATION,
    "uuid": "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "email": f"{_ATOM}(\\.{_ATOM}){{0,7}}@{_HOSTNAME}",
    "hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "ipv6": f"({_IPV6})",
    "uri": _URI,
}


def format_regex(name: object) -> str | None:
    """Return the regex of the texts of a format, or None for a format that is not known."""
    return FORMATS.get(name) if isinstance(name, str) else None
