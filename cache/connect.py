"""Opening an object store: obstore, credentials of the surroundings, time limits, its errors.

obstore and boto3 are imported here alone, and only when a URL is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sherl_pipe.cache.errors import InputError
from sherl_pipe.cache.place import Url

INSTALL = "pip install 'sherl-pipe[cloud]'"
CREDENTIALS = (
    "Give them as the store's own tools do, by environment (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_*), by "
    "profile, or by the machine's role"
)

# A request has so many seconds, and one for every MiB: a link slower than that is none.
SECONDS, MIB = 20, 1 << 20
# Of a request that was answered: these may be answered otherwise the next time.
_PASSING = {408, 409, 425, 429}
_PASSING_CODES = {"RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def library() -> Any:
    """The obstore package. Raises InputError naming the pip command where it is missing."""
    try:
        import obstore
        import obstore.exceptions
    except ImportError as error:
        raise InputError(
            f"caches in object stores need the package obstore. Install it: {INSTALL}"
        ) from error
    return obstore


def seconds_for(size: int) -> int:
    """The time limit of a request for `size` bytes: a power of two, so that clients are few."""
    return 1 << (SECONDS + size // MIB - 1).bit_length()


def client(root: Url, limit: timedelta) -> Any:
    """An obstore store of the bucket of `root`, whose requests end after `limit`.

    Nothing is sent again here: `RemoteStore` knows better what may be.

    Raises InputError where the surroundings do not say what the store has to know.
    """
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    options: Any = {"timeout": limit, "connect_timeout": timedelta(seconds=10)}
    more: Any = {}
    if root.scheme == "s3":
        if _may_speak_plain(os.environ):
            options["allow_http"] = True
        if _wants_profile(os.environ):
            more["credential_provider"] = _profile()
    try:
        return from_url(
            f"{root.scheme}://{root.bucket}",
            client_options=options,
            retry_config={"max_retries": 0},
            **more,
        )
    except (ValueError, BaseError) as error:
        # Without the library's text: it may repeat what the environment holds.
        raise InputError(
            f"{root}: the store cannot be opened with what the environment says "
            f"({type(error).__name__}). {CREDENTIALS}."
        ) from None


def _may_speak_plain(environment: Mapping[str, str]) -> bool:
    """Whether http without TLS is fine: to a server on this very machine.

    Raises InputError for one elsewhere, unless AWS_ALLOW_HTTP (which obstore reads) says so.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    endpoint = next((environment[name] for name in names if environment.get(name)), "")
    parts = urlsplit(endpoint)
    if parts.scheme != "http":
        return False
    if parts.hostname not in _LOOPBACK and environment.get("AWS_ALLOW_HTTP", "").lower() != "true":
        raise InputError(
            f"the endpoint of the object store, {parts.hostname}, speaks http without encryption. "
            "Name its https address in AWS_ENDPOINT_URL, or allow this with AWS_ALLOW_HTTP=true."
        )
    return parts.hostname in _LOOPBACK


def _wants_profile(environment: Mapping[str, str]) -> bool:
    """Whether credentials are in the files of the AWS tools, which obstore does not read."""
    if environment.get("AWS_PROFILE"):
        return True
    others = (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    )
    if any(environment.get(name) for name in others):
        return False
    named = environment.get("AWS_SHARED_CREDENTIALS_FILE")
    return (Path(named) if named else Path("~/.aws/credentials").expanduser()).is_file()


def _profile() -> Any:
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise InputError(
            f"an AWS profile is asked for, which needs the package boto3. Install it: {INSTALL}"
        ) from error
    try:
        return Boto3CredentialProvider()
    except (ValueError, BotoCoreError) as error:
        raise InputError(
            f"the AWS profile gives no credentials ({type(error).__name__}). Check AWS_PROFILE "
            "and the files in ~/.aws."
        ) from None


def reason(error: Exception) -> tuple[str, bool]:
    """What went wrong, in words without a secret, and whether it may pass."""
    text = str(error)
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if "169.254.169.254" in text or "metadata.google.internal" in text:
        return f"no credentials were found. {CREDENTIALS}", False
    if status is None:
        kinds = {
            "ConnectionRefused": "the connection was refused",
            "kind: Timeout": "there was no answer in time",
            "dns error": "the server's name is not known",
            "kind: Connect,": "there is no connection",
            "Interrupted": "the connection broke",
        }
        said = next((words for mark, words in kinds.items() if mark in text), "the request failed")
        return f"{said}, again and again. Check the network and the endpoint", True
    number = int(status[1])
    said = f"the server answers {number}" + (f" {code[1]}" if code else "")
    if number in (401, 403):
        return f"{said}: no permission. {CREDENTIALS}", False
    if 300 <= number < 400:
        return f"{said}: the bucket is in another region. Set AWS_REGION to its own", False
    passing = (
        number >= 500 or number in _PASSING or (code is not None and code[1] in _PASSING_CODES)
    )
    todo = "again and again. Wait until the service is well" if passing else "Check the endpoint"
    return f"{said}{', ' if passing else '. '}{todo}", passing
