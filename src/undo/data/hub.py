"""Datasets of the Hugging Face hub: named in a config, streamed, or replaced by the files that a mirror names."""

from collections.abc import Iterator
from typing import Any

from undo.config import mirror
from undo.config.mistakes import ConfigError
from undo.config.schema import Frozen


class HubDataset(Frozen):
    """Which rows: a split of a subset of a dataset."""

    hub: str | None = None  # owner/name
    subset: str | None = None
    split: str = "train"
    revision: str | None = None  # a commit of the dataset; None: its newest

    def stand_in(self, split: str | None = None) -> str | None:
        """The path or glob of the files that stand for it here, if a mirror names any."""
        return None if self.hub is None else mirror.stand_in(self.hub, self.subset, split or self.split)

    @property
    def dataset(self) -> str:
        """As it is named in messages and records: owner/name:subset@revision."""
        subset, revision = f":{self.subset}" * bool(self.subset), f"@{self.revision}" * bool(self.revision)
        return f"{self.hub}{subset}{revision}"

    def rows(self, split: str | None = None) -> Iterator[dict[str, Any]]:
        """The rows in order, fetched as they are read. Raises ConfigError with the way out if that fails."""
        import datasets
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        from undo.config.secrets import find_token

        assert self.hub is not None
        try:
            yield from datasets.load_dataset(
                self.hub,
                self.subset,
                split=split or self.split,
                revision=self.revision,
                streaming=True,
                token=find_token("hf_token.txt", "HF_TOKEN"),
            )
        except (RepositoryNotFoundError, DatasetNotFoundError) as error:
            if isinstance(error, GatedRepoError) or "gated" in str(error):  # the library keeps its words alone
                raise ConfigError(
                    f"{self.hub} is gated: ask for access at https://huggingface.co/datasets/{self.hub},\n"
                    f"then put your token into tokens/hf_token.txt or HF_TOKEN"
                ) from None
            raise ConfigError(
                f"{self.hub}: there is no such dataset, or a token is needed to see it\n"
                f"put your token into tokens/hf_token.txt or HF_TOKEN"
            ) from None
        except ValueError as error:  # an unknown subset or split
            raise ConfigError(f"{self.dataset}: cannot be read: {_first_line(error)}") from None
        except OSError as error:
            raise ConfigError(f"{self.dataset}: cannot be read: {_first_line(error)}\n{mirror.way_out()}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
