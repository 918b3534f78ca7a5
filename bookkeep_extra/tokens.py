"""Tokens for one company, signed with the service's own: nothing of them is stored."""

import argparse
import base64
import hmac
import json
import os
import time

from bookkeep import (
    ID,
    Access,
    Bookkeeper,
    NotFound,
    check_sample,
    digest,
    one_line,
    read_token,
)

LEAST = 32  # characters of the service's own token, so that nobody finds it out by trying


def company_token(token: str, access: Access, expires: float) -> str:
    """A token for this access until then, in seconds since 1970; it ends with the service's own."""
    said = base64.urlsafe_b64encode(json.dumps([*access, expires]).encode()).decode()
    return f"{said}.{_signature(token, said)}"


def access_of(token: str, given: str) -> Access | None:
    """What a token gives access to, if it was made from the service's own and has not ended."""
    said, _, signature = given.rpartition(".")
    if not hmac.compare_digest(signature.encode("latin-1"), _signature(token, said).encode()):
        return None
    *access, expires = json.loads(base64.urlsafe_b64decode(said))
    return Access(*access) if time.time() < expires else None


def confine(keeper: Bookkeeper, company: str, of: str, asked: dict, content: object) -> None:
    """Has the token of a company get what is its own: changes what is asked for, or refuses it.

    Raises NotFound.
    """
    if asked.get("company", "") is None:
        asked["company"] = company
    if key := asked.get("Idempotency-Key"):
        asked["Idempotency-Key"] = f"{digest(company):x} {key}"  # others may have the same
    if of == "samples":
        samples = content if isinstance(content, list) else [content]
        own = all(sample["CompanyId"] == company for sample in samples)
    elif of == "booking" and ID in (content or ()):
        own = content["CompanyId"] == company
    elif of == "booking":
        own = keeper.books.history.has(company, (content or asked).get("seq", -1))
    else:
        own = asked.get("company", asked.get("id", company)) == company
    if not own:
        raise NotFound(
            f"this token is for the company {one_line(company)}, which has no such thing"
        )


def print_token(options: argparse.Namespace) -> int:
    """Prints a company's token; the exit status. Raises BadRequest, OSError."""
    token = read_token(options.token_file)
    if len(token or "") < LEAST:
        raise OSError(
            f"give the service's own token, in BOOKKEEP_TOKEN or with --token-file; it must have "
            f"{LEAST} characters or more, as who has one made from it can try to guess it"
        )
    # The same whatever the locale is.
    company = os.fsencode(options.company).decode(errors="surrogateescape")
    check_sample({"CompanyId": company}, ("CompanyId",))
    access = Access(company, not options.read_only)
    print(company_token(token, access, int(time.time()) + options.days * 86_400))
    return 0


def _signature(token: str, said: str) -> str:
    return hmac.digest(token.encode(), said.encode("latin-1"), "sha256").hex()
