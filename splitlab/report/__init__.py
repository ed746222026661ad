"""Tables and pictures to pages that say what was found."""
