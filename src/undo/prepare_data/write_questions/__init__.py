"""Questions and answers from a corpus, written by a model or by rule (Appendix D.2.2)."""
