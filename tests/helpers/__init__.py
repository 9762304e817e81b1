"""What several test files share: small models and data sets, runs, hosts, literal transcriptions, a page's reader."""
