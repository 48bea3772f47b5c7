#!/bin/sh
# Mender's update module for models: /usr/share/mender/modules/v3/slm. What an artifact brings is a
# package for slm-install, which checks it, tests it and keeps the version before.
#
# SLM_INSTALL_OPTIONS in /etc/default/slm-install are those of slm-install (--root, --keys, --health).
set -u
[ -r /etc/default/slm-install ] && . /etc/default/slm-install
state=$1 files=$2
install=${SLM_INSTALL:-slm-install}

for package in "$files"/files/slm-*.tar.gz; do
  name=${package##*/slm-}
  name=${name%.tar.gz}
done

case $state in
  NeedsArtifactReboot) echo No ;;
  SupportsRollback) echo Yes ;;
  ArtifactInstall)
    $install ${SLM_INSTALL_OPTIONS:-} install "$package" || exit 1
    : >"$files/tmp/installed"
    ;;
  # Where it was not installed, the version before never went out of use.
  ArtifactRollback)
    [ -e "$files/tmp/installed" ] || exit 0
    exec $install ${SLM_INSTALL_OPTIONS:-} rollback "$name"
    ;;
esac
exit 0
