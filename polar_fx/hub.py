"""The HuggingFace hub: what is kept as a folder, such as a predictor or a bundle, comes from there
and goes there.

The verbs are those of `huggingface_hub.ModelHubMixin`; its `config.json` of constructor arguments
has no use here, so they stand on the hub's functions themselves.
"""

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

from .errors import InputError, ModelNotFoundError
from .output.files import write_whole
from .output.plain_text import first_line

CARD = "README.md"
_PAPER = "https://arxiv.org/abs/2606.06574"


class OnTheHub:
    """A value that is kept as a folder, and can be shared as one."""

    hub_kind: ClassVar[str]
    """What it is called in messages."""

    hub_files: ClassVar[tuple[str, ...]]
    """Patterns of the files that are fetched; nothing else of a repository is."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """What a local folder, or a repository of the HuggingFace hub, holds.

        Args:
            name: the folder, or `user/name`; a folder that is there is taken before the hub.
            revision: a branch, tag or commit of the repository (default: its main branch).
            local_files_only: take what was fetched before, and do not ask the hub.
            token: for the hub; by default the one that `hf auth login` keeps.
            options: what the class takes beside these.

        Raises ModelNotFoundError for what cannot be fetched, and InputError.
        """
        place = Path(name).expanduser()
        if place.is_dir():
            if revision is not None:
                raise InputError(
                    f"revision={revision!r} is for repositories of the hub, and {place} is a local "
                    "folder; leave it out, or name the repository"
                )
            return cls._read_folder(place, **options)
        fetched = fetch(
            os.fspath(name),
            cls.hub_kind,
            files=cls.hub_files,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
        )
        return cls._read_fetched(fetched, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], *, about: str = "") -> Path:
        """Write the folder, with a model card (`README.md`), and return it.

        `about` is Markdown that follows the card's first lines, such as what was measured. A card
        that is there stays, unless `about` is given. Raises InputError, and BundleError for a
        bundle.
        """
        return self._with_card(self._write_folder(Path(folder).expanduser()), about)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        about: str = "",
        commit_message: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the folder that `save_pretrained` writes, as one commit, to a repository that is
        made if it is not there; returns the commit's address.

        `revision` is a branch that is there (default: main); `private` counts for a new
        repository. Raises InputError for what the hub refuses.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        with tempfile.TemporaryDirectory(prefix="polar_fx-") as spare:
            place = self._with_card(self._upload_folder(Path(spare) / "folder"), about)
            api = HfApi(token=token)
            try:
                made = api.create_repo(repo_id, private=private, exist_ok=True)
                return api.upload_folder(
                    repo_id=made.repo_id,
                    folder_path=place,
                    commit_message=commit_message or f"Upload a {self.hub_kind} of polar_fx",
                    revision=revision,
                )
            except (HTTPError, OSError, ValueError) as error:
                raise InputError(
                    f"the {self.hub_kind} cannot be uploaded to {repo_id!r}: {first_line(error)}; "
                    "log in with `hf auth login`, and name a repository that you may write to, "
                    "user/name"
                ) from error

    @classmethod
    def _read_folder(cls, place: Path, **options: Any) -> Self:
        raise NotImplementedError

    @classmethod
    def _read_fetched(cls, place: Path, **options: Any) -> Self:
        """From a folder of the hub's cache, whose files are links."""
        return cls._read_folder(place, **options)

    def _write_folder(self, place: Path) -> Path:
        raise NotImplementedError

    def _upload_folder(self, place: Path) -> Path:
        """A folder to be uploaded, which may hold links to files that lie elsewhere."""
        return self._write_folder(place)

    def _with_card(self, place: Path, about: str) -> Path:
        """The folder, with a model card in it."""
        if about or not (place / CARD).exists():
            write_whole(self._card(about).encode(), place / CARD)
        return place

    def _card(self, about: str) -> str:
        """The text of the model card."""
        raise NotImplementedError


def fetch(
    name: str,
    what: str,
    *,
    files: tuple[str, ...],
    revision: str | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    """The folder of the hub's cache with these files of a repository.

    Raises ModelNotFoundError; `what` names the kind.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        place = snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=list(files),
        )
    except (HTTPError, OSError, ValueError) as error:
        where = "in the hub's local cache" if local_files_only else "on the HuggingFace hub"
        raise ModelNotFoundError(
            f"the {what} {name!r} is no local folder, and was not found {where}: "
            f"{first_line(error)}; name a folder, or a repository user/name that is there"
        ) from error
    return Path(place)


def card(title: str, *, tags: tuple[str, ...], parts: tuple[str, ...]) -> str:
    """A model card: what the hub reads of it, a heading, and paragraphs of Markdown."""
    from huggingface_hub import ModelCardData

    facts = ModelCardData(
        library_name="polar_fx", pipeline_tag="text-generation", tags=["polar_fx", *tags]
    )
    source = f"Made with polar_fx, which runs programs of layers ([PoLar]({_PAPER}))."
    paragraphs = [f"# {title}", *filter(None, parts), source]
    return f"---\n{facts.to_yaml()}\n---\n\n" + "\n\n".join(paragraphs) + "\n"
