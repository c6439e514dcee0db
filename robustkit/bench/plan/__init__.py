"""Plans: specs of models, threats, attacks, goals and defences, plan files, and the options of the command line."""
