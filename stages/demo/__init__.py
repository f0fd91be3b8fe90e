"""The embedded demo: a generated English corpus and a tiny T5 pre-trained on its grammar."""
