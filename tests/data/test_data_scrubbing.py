"""Mail addresses and secrets go, what looks like them stays, and no text takes long.

The secrets are made here, so that this file holds none.
"""

import random
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from summerlm.data.rules.scrubbing import (
    EMAIL,
    SCRUBBERS,
    SECRET,
    TOKENS,
    scrub_emails,
    scrub_secrets,
)

draw = random.Random(0)
ALNUM = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


def made_of(characters, count):
    return "".join(draw.choices(characters, k=count))


ADDRESSES = [
    "ann@mail.org",
    "Ann.Lee+lists@sub-domain.mail.co.uk",
    "_x@a.io",
    "ANN_LEE%x@MAIL.COM",
    "a@xn--bcher-kva.de",
    "12345@qq.com",
    "x" * 64 + "@mail.org",
]
AROUND = [
    "{}",
    "({})",
    "<{}>",
    "mailto:{}",
    "Mail: {}.",
    "'{}',",
    "“{}”",
    "é {} é",
    "{};x",
    "\n{}\n",
]
NO_ADDRESSES = [
    "@decorator",
    "@app.get('/x')",
    "user@localhost",
    "git clone git@github.com:owner/repository.git",
    "git clone git@code.io.host.org:owner/repository.git",
    "scp file ann@host.org:/tmp",
    "rsync ann@host.org:~/x .",
    "ssh://git@github.com/owner/repository",
    "https://lists.host.org/list/dev@host.org/thread",
    "icon@2x.png and icon@3x.me",
    "lodash@4.17.21",
    "@scope/package@1.2.3",
    "W@x.mean() + a@b.T",
    "a@b.to(device)",
    "a @ b.com",
    "name@example.com",
    "you@mail.example.org",
    "you@host.test",
    "x" * 65 + "@mail.org",
    "a@b",
    "a@.com",
    "\\ar@{..>}[d]",
    "100% @ 5.50",
    "actions/checkout@v4.io-x",
]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_become_one_placeholder(address, around):
    assert scrub_emails(around.format(address)) == (around.format(EMAIL), 1)


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_what_looks_like_an_address_stays(text):
    assert scrub_emails(f"so {text} it is") == (f"so {text} it is", 0)


def test_every_address_counts():
    assert scrub_emails("a@x.org, b@x.org b@x.org") == (f"{EMAIL}, {EMAIL} {EMAIL}", 3)


def samples():
    """Secrets of every form, made up."""
    base64 = ALNUM + "-_"
    yield "AWS access key", "AKIA" + made_of(string.ascii_uppercase + "234567", 16)
    yield "AWS access key", "ASIA" + made_of(string.ascii_uppercase + "234567", 16)
    yield "AWS secret key", made_of(ALNUM + "/+", 40)
    yield "Azure client secret", made_of(ALNUM, 3) + "8Q~" + made_of(ALNUM + "-_.~", 33) + "a"
    for kind in "pousr":
        yield "GitHub", f"gh{kind}_" + made_of(ALNUM, 36)
    yield "GitHub, fine-grained", "github_pat_" + made_of(ALNUM, 22) + "_" + made_of(ALNUM, 59)
    for kind in ["pat", "dt", "rt", "cbt", "ptt", "ft", "imt", "agent", "oas", "soat"]:
        yield "GitLab", f"gl{kind}-" + made_of(base64, 20)
    yield "GitLab", "glpat-" + made_of(base64, 30) + ".01." + made_of(HEX, 9)
    yield (
        "Slack",
        f"xoxb-{made_of('123456789', 12)}-{made_of('123456789', 12)}-{made_of(ALNUM, 24)}",
    )
    yield "Slack", f"xoxp-{'-'.join(made_of('123456789', 12) for _ in range(3))}-{made_of(HEX, 32)}"
    yield "Slack", "xoxe.xoxp-1-" + made_of(ALNUM, 163)
    yield (
        "Slack, app",
        f"xapp-1-A{made_of('ABC123', 10)}-{made_of('123456', 13)}-{made_of(HEX, 64)}",
    )
    yield (
        "Slack, hook",
        f"hooks.slack.com/services/T{made_of(ALNUM, 10)}/B{made_of(ALNUM, 9)}/{made_of(ALNUM, 24)}",
    )
    yield "Google API", "AIza" + made_of(base64, 35)
    yield "Google OAuth", "GOCSPX-" + made_of(base64, 28)
    yield "Google OAuth", "ya29." + made_of(base64, 150)
    yield "Stripe", "sk_live_" + made_of(ALNUM, 24)
    yield "Stripe", "rk_test_" + made_of(ALNUM, 99)
    yield "Stripe, hook", "whsec_" + made_of(ALNUM, 32)
    yield "Hugging Face", "hf_" + made_of(ALNUM, 34)
    yield "Anthropic", "sk-ant-api03-" + made_of(base64, 93) + "AA"
    yield "OpenAI and alike", "sk-" + made_of(ALNUM, 20) + "T3BlbkFJ" + made_of(ALNUM, 20)
    yield "OpenAI and alike", "sk-proj-" + made_of(base64, 156)
    yield "OpenAI and alike", "sk-or-v1-" + made_of(HEX, 64)
    yield "Groq", "gsk_" + made_of(ALNUM, 52)
    yield "xAI", "xai-" + made_of(ALNUM, 80)
    yield "Perplexity", "pplx-" + made_of(ALNUM, 48)
    yield "Replicate", "r8_" + made_of(ALNUM, 37)
    yield (
        "JSON web token",
        f"eyJ{made_of(base64, 33)}.eyJ{made_of(base64, 80)}.{made_of(base64, 43)}",
    )
    yield "npm", "npm_" + made_of(ALNUM, 36)
    yield "PyPI", "pypi-AgEIcHlwaS5vcmc" + made_of(base64, 150)
    yield "RubyGems", "rubygems_" + made_of(HEX, 48)
    yield "Docker", "dckr_pat_" + made_of(base64, 27)
    yield "DigitalOcean", "dop_v1_" + made_of(HEX, 64)
    yield "Databricks", "dapi" + made_of(HEX, 32) + "-2"
    yield "SendGrid", f"SG.{made_of(base64, 22)}.{made_of(base64, 43)}"
    yield "Shopify", "shpat_" + made_of(HEX, 32)
    yield "Square", "sq0csp-" + made_of(base64, 43)
    yield "Telegram", made_of("123456789", 10) + ":AA" + made_of(base64, 33)
    yield "Atlassian", "ATATT3" + made_of(base64, 186)
    yield "Grafana", f"glsa_{made_of(ALNUM, 32)}_{made_of(HEX, 8)}"
    yield "Grafana", "glc_" + made_of(ALNUM, 80)
    yield "Vault", "hvs." + made_of(base64, 95)
    yield "age", "AGE-SECRET-KEY-1" + made_of("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 58)


SAMPLES = list(samples())


def key_block(kind, body, end="\n"):
    return f"-----BEGIN {kind}-----{end}{body}{end}-----END {kind}-----"


BODY = "\n".join(made_of(ALNUM + "+/", 64) for _ in range(20))
ONE_LINE = BODY.replace("\n", "\\n")
KEYS = {
    "RSA": (key_block("RSA PRIVATE KEY", BODY), BODY),
    "PKCS8": (key_block("PRIVATE KEY", BODY), BODY),
    "OpenSSH": (key_block("OPENSSH PRIVATE KEY", BODY), BODY),
    "encrypted": (
        key_block("EC PRIVATE KEY", f"Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0A\n\n{BODY}"),
        BODY,
    ),
    "PGP": (key_block("PGP PRIVATE KEY BLOCK", f"Version: x\n\n{BODY}\n=aB1c"), BODY),
    "in JSON": (key_block("PRIVATE KEY", ONE_LINE, "\\n"), ONE_LINE),
    "CRLF": (key_block("PRIVATE KEY", BODY.replace("\n", "\r\n"), "\r\n"), BODY.split("\n")[3]),
    "indented": (key_block("PRIVATE KEY", BODY.replace("\n", "\n    ")), BODY.split("\n")[3]),
}


def test_every_form_has_a_sample():
    assert {name for name, _ in SAMPLES} | {"private key"} == set(TOKENS)


@pytest.mark.parametrize("around", ["{}", "key = '{}'", 'x="{}";', "`{}`.", "a\n{}\nb", "é={}&y"])
@pytest.mark.parametrize(("name", "secret"), SAMPLES)
def test_secrets_become_one_placeholder(name, secret, around):
    if name == "AWS secret key":
        around = around.replace("{}", "AWS_SECRET_ACCESS_KEY = {}")
    assert scrub_secrets(around.format(secret)) == (around.format(SECRET), 1)


@pytest.mark.parametrize(("name", "secret"), SAMPLES)
def test_a_part_or_a_longer_word_is_no_secret(name, secret):
    if not secret.startswith(("xoxe.", "hooks")) and name != "AWS secret key":
        assert scrub_secrets(f"x{secret}")[1] == 0
    assert scrub_secrets(secret[:14])[1] == 0
    if name not in ("AWS secret key", "GitLab", "JSON web token"):
        assert scrub_secrets(secret + "x" * 1000)[1] == 0


@pytest.mark.parametrize("key", KEYS)
def test_key_blocks_lose_their_body(key):
    block, body = KEYS[key]
    text, count = scrub_secrets(f"before\n{block}\nafter")
    assert count == 1
    assert body not in text
    assert text.startswith(f"before\n{block[:20]}")
    assert text.endswith(
        "PRIVATE KEY BLOCK-----\nafter" if key == "PGP" else "PRIVATE KEY-----\nafter"
    )
    assert len(text) < 200


def test_two_keys_are_two():
    block = KEYS["RSA"][0]
    assert scrub_secrets(f"{block}\n{block}")[1] == 2


LOOK_ALIKES = [
    "AKIAIOSFODNN7EXAMPLE",  # the one of AWS's documentation
    "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "aws_secret_access_key = os.environ['AWS_SECRET_ACCESS_KEY']",
    "ghp_" + "x" * 36,
    "ghp_short",
    "sk-" + "0" * 48,
    "sk-your-api-key-here-please-and-thank-you-very-much",
    "task-" + "management" * 4 + "1",
    "disk-0123456789abcdef0123456789abcdef01234567",
    "sk-abcdefghijklmnopqrstuvwxyzabcdefghijklmn",  # no digit
    "xoxb-your-token-here-and-no-other-token-at-all",
    "hf_hub_download_and_everything_else_in_one",
    "npm_config_registry",
    "AIzaSy" + "X" * 33,
    "eyJust.eyJunk.x",
    made_of(HEX, 40),  # a hash
    made_of(HEX, 64),
    "123e4567-e89b-12d3-a456-426614174000",
    "git@github.com:owner/repository.git",
    "data:image/png;base64," + made_of(ALNUM + "+/", 400),
    key_block("PUBLIC KEY", BODY),
    key_block("CERTIFICATE", BODY),
    key_block("PRIVATE KEY", "..."),
    "-----BEGIN PRIVATE KEY-----",
    "if line.startswith('-----BEGIN RSA PRIVATE KEY-----') and '-----END' in text:",
    "-----BEGIN PRIVATE KEY----- is how it begins: " + made_of(ALNUM, 64),
    "-----BEGIN PRIVATE KEY-----" + "is_text(of, words)\n" * 20 + "-----END PRIVATE KEY-----",
    "password = 'correct horse battery staple'",
    "SECRET_KEY = 'django-insecure-abc'",
]


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_what_looks_like_a_secret_stays(text):
    assert scrub_secrets(f"so\n{text}\nit is") == (f"so\n{text}\nit is", 0)


REAL = [*ADDRESSES, *(secret for _, secret in SAMPLES), *(block for block, _ in KEYS.values())]


@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(REAL + LOOK_ALIKES)), max_size=6))
def test_scrubbing_again_changes_nothing(pieces):
    text = " ".join(pieces)
    for scrub in SCRUBBERS.values():
        once, _ = scrub(text)
        assert scrub(once) == (once, 0)


def adversaries(size):
    """Texts of so many bytes that begin like what is looked for, again and again."""
    starts = [mark for marks, _ in TOKENS.values() for mark in marks]
    starts += [secret[:-1] for _, secret in SAMPLES]
    starts += ["a", "a@", "a.", "a@a.", "a@a.a.", "@example.", "a.a.a.a@", "a@a-", "%", "-", "- "]
    starts += ["eyJ" + "a" * 20 + ".", "eyJ" + "a" * 500 + ".", "a." * 30 + "@", "-----"]
    starts += [key + more for key in ("-----BEGIN PRIVATE KEY-----",) for more in ("", "A" * 70)]
    starts += ["-----BEGIN " + "A" * 30, "aws_secret_access_key" + " " * 5, "\n" * 63 + "a"]
    for start in dict.fromkeys(starts):
        yield (start * (size // len(start) + 1))[:size]
        if len(start) > 1:
            yield start + start[-1] * size
    yield "ghp_ @ PRIVATE KEY eyJ. " + "a" * size
    yield "a@" + "a." * (size // 2)
    for body in ("a-", "a", "\n" * 63 + "a"):
        yield (
            "-----BEGIN PRIVATE KEY-----" + body * (size // len(body)) + "-----END PUBLIC KEY-----"
        )


@pytest.mark.parametrize("size", [2**17, pytest.param(2**20, marks=pytest.mark.slow)])
def test_no_text_takes_long(size):
    slowest = 0.0
    for text in adversaries(size):
        for scrub in SCRUBBERS.values():
            start = time.process_time()
            scrub(text)
            slowest = max(slowest, time.process_time() - start)
    assert slowest < 2 * size / 2**20  # ten times the slowest; a square would take minutes
