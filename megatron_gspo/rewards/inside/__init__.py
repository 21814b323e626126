"""What is run inside of the sandbox, beside a program that nobody trusts; read as text, never imported by a run."""
