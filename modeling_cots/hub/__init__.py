"""What a repository on the Hub carries beside weights and code: card, standard exports, widget examples, handler."""
