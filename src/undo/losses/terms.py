"""The named terms of a loss, worked out when they are asked for, so that a step runs only what it needs."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class OnDemand(Mapping[str, Tensor]):
    """Named, already weighted terms, each worked out when it is first read. The loss is their sum.

    A term is a sum over the labels or documents of a micro-batch, and adds up over micro-batches. Where `outer` has its
    name, the term is outer(that sum) of the *whole* batch: a curved function, whose argument alone adds up. So reading
    such a term gives the loss of a batch that is not split; `summand` gives the argument.
    """

    def __init__(
        self, terms: Mapping[str, Callable[[], Tensor]], outer: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> None:
        self._terms, self.outer = dict(terms), dict(outer or {})
        self._found: dict[str, Tensor] = {}

    def summand(self, name: str) -> Tensor:
        if name not in self._found:
            self._found[name] = self._terms[name]()
        return self._found[name]

    def __getitem__(self, name: str) -> Tensor:
        value = self.summand(name)
        return self.outer[name](value) if name in self.outer else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)

    def and_also(self, terms: Mapping[str, Callable[[], Tensor]]) -> "OnDemand":
        """These terms and others."""
        return OnDemand({name: lambda n=name: self.summand(n) for name in self} | dict(terms), self.outer)
