"""What is asked: the words of the command line, plan files, and what each spec means."""
