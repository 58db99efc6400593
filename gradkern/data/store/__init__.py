"""The store on disk: its arrays, its ledger of finished chunks, and files that survive a kill."""
