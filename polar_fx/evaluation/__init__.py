"""Other methods that choose a program for a question, rebuilt to be measured beside ours."""
