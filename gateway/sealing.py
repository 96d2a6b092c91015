"""Encrypting exported weights for those whom their owner names, with age (https://age-encryption.org/v1).

Who has a recipient's private key decrypts a file with `age -d -i KEY FILE.age`; this server never has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyrage

from engines.interface import UserError
from engines.storage import CHECKSUMS, PLAIN, FolderStorage

SUFFIX = ".age"
"""What an encrypted file's name ends with."""
MOST_RECIPIENTS = 10
_ECHO = 60

Recipient = Any
"""One of pyrage's: it comes without types."""


def plain_folder(folder: str) -> str:
    """Where an engine writes what will be encrypted into a folder."""
    return f"{folder}{PLAIN}"


def parse_recipients(texts: Sequence[str]) -> list[Recipient]:
    """Native X25519 (`age1…`) and SSH (`ssh-ed25519`, `ssh-rsa`) public keys. Raises UserError naming the one that is
    none."""
    if not texts or len(texts) > MOST_RECIPIENTS:
        raise UserError(
            f"age_encryption_recipients has {len(texts)} recipients; give 1 to {MOST_RECIPIENTS}, or leave it out for "
            "files that are not encrypted"
        )
    return [_recipient(text.strip(), place) for place, text in enumerate(texts)]


def _recipient(text: str, place: int) -> Recipient:
    form = pyrage.ssh.Recipient if text.startswith("ssh-") else pyrage.x25519.Recipient
    try:
        return form.from_str(text)
    except pyrage.RecipientError as error:
        raise UserError(
            f"age_encryption_recipients[{place}] is {text[:_ECHO]!r}; it must be a native age1… key (X25519) or a "
            "public key of SSH (ssh-ed25519 or ssh-rsa)"
        ) from error


def seal_folder(storage: FolderStorage, folder: str, recipients: Sequence[str]) -> int:
    """Encrypt every file of the plain folder into `folder`, then remove the plain one; gives the bytes written.

    What is there afterwards is complete and synced. It may be repeated, also after it has ended.
    Raises UserError, and OSError as storage does.
    """
    parsed = parse_recipients(recipients)
    if storage.bring(folder).is_dir() and not storage.bring(plain_folder(folder)).is_dir():
        return storage.size(storage.open(folder))
    plain = storage.open(plain_folder(folder))
    with storage.write(folder) as sealed:
        for path in sorted(path for path in plain.iterdir() if path.name != CHECKSUMS):
            # file to file, for the library holds Python's lock while it encrypts a whole one by itself
            with path.open("rb") as source, (sealed / f"{path.name}{SUFFIX}").open("wb") as target:
                pyrage.encrypt_io(source, target, parsed)
        size = storage.size(sealed)
    storage.remove(plain_folder(folder))
    return size
