"""From files of text to tokenised documents on disk: what ``statex prepare`` works with."""
