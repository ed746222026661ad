"""What everything stands on: errors, seeds, paths, configuration, storage, parallel work, tables, labels."""
