r"""Mail addresses and secrets -> fixed placeholders.

Flow: `pipeline.Rules` applies the asked ones of `SCRUBBERS` to texts that are kept, and the
ledger counts the replacements.

Mail addresses end in a country's two letters or a common top-level domain (IANA's root zone);
`image@2x.png`, `x@y.mean()` and the remotes of git and scp (`git@host.org:path`, `//git@host.org`)
stay, and so do the reserved domains of RFC 2606. "joe at host dot org" is not found.

Secrets are private key blocks and tokens that their vendor gave a form of its own. What only a
name beside it makes a secret (`password = "..."`) stays, and so do look-alikes: hashes, UUIDs,
examples with EXAMPLE in them or hardly any different characters.

Every expression begins where a run of its characters begins, or with a literal, and repeats
possessively or within bounds, so that time grows with the length of a text and not its square.

Written anew rather than taken from `detect-secrets`, which splits into lines, so that key blocks
lose but their first line, finds without replacing, and is made for a file at a time rather than
for megabytes a second.

Source:
    The forms as the vendors' pages and gitleaks tell them (github.com/gitleaks/gitleaks,
    config/gitleaks.toml at b58d3f10, MIT licence).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

EMAIL = "email@example.com"  # a reserved domain: stays when scrubbed again
SECRET = "<SECRET>"
DISTINCT = 10  # different characters that a secret has at least
KEY_RUN = 40  # base64 characters in a row in a key block; without, it is code or documentation

_TOP_LEVEL = (
    "[a-z]{2}|com|org|net|edu|gov|mil|int|info|biz|name|pro|museum|aero|coop|jobs|mobi|travel|cat|"
    "asia|tel|app|dev|cloud|email|tech|online|site|store|shop|blog|xyz|club|live|news|media|agency|"
    "digital|network|systems|solutions|company|group|world|life|today|space|website|academy|"
    "institute|university|foundation|software|technology|services|support"
)
_EMAIL = re.compile(
    r"""
    (?<![\w.%+/-])                    # not inside a longer name, nor the user of a //user@host
    \w[\w.%+-]{0,63}                  # RFC 5321: 64 characters at most
    @(?!\dx\.)(?!(?:[\w-]{1,63}\.){0,8}(?:example\.(?:com|org|net)|example|test|invalid)\b)
    (?>(?:[a-z0-9][a-z0-9-]{0,62}\.){1,8}(?:"""
    + _TOP_LEVEL
    + r""")(?![\w-]))                  # the longest name, or none
    (?!\(|\[|:[\w/~.])                # not a call, nor host:path
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)


_KEY_BLOCK = re.compile(
    rf"""
    (?P<before>-----BEGIN[ A-Z0-9]{{0,40}}[ ]PRIVATE[ ]KEY(?:[ ]BLOCK)?-----)
    (?=(?:[A-Za-z0-9+/]{{1,{KEY_RUN - 1}}}+(?![A-Za-z0-9+/])|(?!-----)[^A-Za-z0-9+/])*+
       [A-Za-z0-9+/])                 # a run of KEY_RUN
    [^-]*+(?:-(?!----)[^-]*+)*+       # up to the next five hyphens
    (?=-----END[ ])
    """,
    re.VERBOSE,
)


class Token(NamedTuple):
    """A form of secrets.

    Args:
        marks: Literals of which a text holds one, if it holds such a secret; quick to look for.
        form: Matches the secret, or with a group named `before` also what is kept before it.
    """

    marks: tuple[str, ...]
    form: re.Pattern[str]


def _token(marks: str, form: str) -> Token:
    """Make a form that is no part of a longer word."""
    return Token(tuple(marks.split()), re.compile(rf"(?<![\w-])(?:{form})(?![\w-])", re.ASCII))


TOKENS = {
    "AWS access key": _token("AKIA ASIA", r"(?:AKIA|ASIA)[A-Z2-7]{16}"),
    "AWS secret key": Token(
        ("aws", "AWS"),
        re.compile(
            r"(?P<before>aws_?secret_?access_?key[\"']?\s{0,5}(?::|=>?)\s{0,5}[\"']?)"
            r"[a-z0-9/+]{40}(?![a-z0-9/+=])",
            re.IGNORECASE | re.ASCII,
        ),
    ),
    "Azure client secret": _token("Q~", r"[\w~.]{3}\dQ~[\w~.-]{31,34}"),
    "GitHub": _token("ghp_ gho_ ghu_ ghs_ ghr_", r"gh[pousr]_[A-Za-z0-9]{36,255}"),
    "GitHub, fine-grained": _token("github_pat_", r"github_pat_\w{82}"),
    "GitLab": _token(
        "glpat- gldt- glrt- glcbt- glptt- glft- glimt- glagent- gloas- glsoat-",
        r"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat)-[\w-]{20,300}(?:\.\w{2}\.?\w{7,9})?",
    ),
    "Slack": _token("xox", r"(?:xoxe\.)?xox[abeoprs]-\d{1,14}-[A-Za-z0-9-]{15,255}"),
    "Slack, app": _token("xapp-", r"xapp-\d-[A-Z0-9]{8,20}-\d{8,20}-[a-z0-9]{32,128}"),
    "Slack, hook": _token(
        "hooks.slack.com", r"hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9+/]{43,56}"
    ),
    "Google API": _token("AIza", r"AIza[\w-]{35}"),
    "Google OAuth": _token("GOCSPX- ya29.", r"GOCSPX-[\w-]{28}|ya29\.[\w-]{30,1000}"),
    "Stripe": _token("_live_ _test_", r"[sr]k_(?:live|test)_[A-Za-z0-9]{16,247}"),
    "Stripe, hook": _token("whsec_", r"whsec_[A-Za-z0-9+/]{32,64}"),
    "Hugging Face": _token("hf_ api_org_", r"(?:hf|api_org)_[A-Za-z0-9]{34}"),
    "Anthropic": _token("sk-ant-", r"sk-ant-[a-z0-9]{3,10}-[\w-]{80,120}"),
    "OpenAI and alike": _token(
        "sk-",
        r"sk-(?:proj|svcacct|admin|or-v1)-[\w-]{40,200}|sk-(?=[A-Za-z]{0,31}\d)[A-Za-z0-9]{32,64}",
    ),
    "Groq": _token("gsk_", r"gsk_[A-Za-z0-9]{52}"),
    "xAI": _token("xai-", r"xai-[A-Za-z0-9]{80}"),
    "Perplexity": _token("pplx-", r"pplx-[A-Za-z0-9]{48}"),
    "Replicate": _token("r8_", r"r8_[A-Za-z0-9]{37}"),
    "JSON web token": _token("eyJ", r"eyJ[\w-]{14,}+\.eyJ[\w-]{14,}+\.[\w-]{10,}+"),
    "npm": _token("npm_", r"npm_[A-Za-z0-9]{36}"),
    "PyPI": _token("pypi-AgE", r"pypi-AgE[\w-]{50,1000}"),
    "RubyGems": _token("rubygems_", r"rubygems_[a-f0-9]{48}"),
    "Docker": _token("dckr_", r"dckr_[po]at_[\w-]{27,32}"),
    "DigitalOcean": _token("_v1_", r"do[opr]_v1_[a-f0-9]{64}"),
    "Databricks": _token("dapi", r"dapi[a-f0-9]{32}(?:-\d)?"),
    "SendGrid": _token("SG.", r"SG\.[\w-]{22}\.[\w-]{43}"),
    "Shopify": _token("shp", r"shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{32}"),
    "Square": _token("sq0", r"sq0[a-z]{3}-[\w-]{22,60}"),
    "Telegram": _token(":AA", r"\d{8,10}:AA[\w-]{33}"),
    "Atlassian": _token("ATATT3", r"ATATT3[\w=-]{186}"),
    "Grafana": _token(
        "glsa_ glc_", r"glsa_[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}|glc_[A-Za-z0-9+/]{32,400}"
    ),
    "Vault": _token("hvs. hvb.", r"hv[sb]\.[\w-]{90,300}"),
    "age": _token("AGE-SECRET-KEY-1", r"AGE-SECRET-KEY-1[02-9AC-HJ-NP-Z]{58}"),
    "private key": Token(("PRIVATE KEY",), _KEY_BLOCK),
}


def scrub_emails(text: str) -> tuple[str, int]:
    """Replace mail addresses by `EMAIL`.

    Args:
        text: The text.

    Returns:
        The text without them, and how many there were.

    Example:
        >>> scrub_emails("Ask ann@mail.org, or clone git@mail.org:ann/code")
        ('Ask email@example.com, or clone git@mail.org:ann/code', 1)
    """
    return _EMAIL.subn(EMAIL, text) if "@" in text else (text, 0)


def scrub_secrets(text: str) -> tuple[str, int]:
    """Replace secrets by `SECRET`; of a key block the body.

    Args:
        text: The text.

    Returns:
        The text without them, and how many there were.
    """
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        before = match.groupdict().get("before", "")
        secret = match[0].removeprefix(before)
        if "EXAMPLE" in secret or len(set(secret)) < DISTINCT:
            return match[0]
        count += 1
        return before + SECRET

    for marks, form in TOKENS.values():
        if any(mark in text for mark in marks):
            text = form.sub(replace, text)
    return text, count


SCRUBBERS: dict[str, Callable[[str], tuple[str, int]]] = {
    "emails": scrub_emails,
    "secrets": scrub_secrets,
}
