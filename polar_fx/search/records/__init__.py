"""What searches found: records, their files, other projects' formats."""
