def write_card(folder, ledger):
    pass
