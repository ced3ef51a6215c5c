//! NFS volumes, mounted by the machine's own `mount` and its helper, as the kubelet does it.

use std::{path::Path, process::Stdio};

use k8s_openapi::api::core::v1::NFSVolumeSource;
use tokio::process::Command;

use super::mounts;

/// Mounts an export at `target`; one that is mounted there stays.
pub(super) async fn mount(target: &Path, source: &NFSVolumeSource, options: &[String]) -> Result<(), String> {
    mount_by("mount", target, source, options).await
}

/// What `mount` is told.
fn arguments(target: &Path, source: &NFSVolumeSource, options: &[String]) -> Vec<String> {
    let read_only = source.read_only == Some(true);
    let mut options: Vec<&str> = options.iter().map(String::as_str).collect();
    if read_only && !options.contains(&"ro") {
        options.push("ro");
    }
    let server = if source.server.contains(':') { format!("[{}]", source.server) } else { source.server.clone() };
    let mut all = vec!["-t".to_owned(), "nfs".to_owned()];
    if !options.is_empty() {
        all.extend(["-o".to_owned(), options.join(",")]);
    }
    all.extend([format!("{server}:{}", source.path), target.display().to_string()]);
    all
}

async fn mount_by(program: &str, target: &Path, source: &NFSVolumeSource, options: &[String]) -> Result<(), String> {
    if mounts::is_mount(target) {
        return Ok(());
    }
    std::fs::create_dir_all(target).map_err(|e| format!("{}: {e}", target.display()))?;
    let arguments = arguments(target, source, options);
    let mut command = Command::new(program);
    command.args(&arguments).stdin(Stdio::null()).kill_on_drop(true);
    let ran = command.output().await.map_err(|e| format!("mount failed: {program}: {e}"))?;
    if ran.status.success() {
        return Ok(());
    }
    let status = ran.status.code().map_or_else(|| ran.status.to_string(), |code| format!("exit status {code}"));
    let output = [ran.stdout, ran.stderr].concat();
    Err(format!(
        "mount failed: {status}\nMounting command: mount\nMounting arguments: {}\nOutput: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output)
    ))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[tokio::test]
    async fn mount_is_asked_and_its_words_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let (program, told, target) = (dir.path().join("mount"), dir.path().join("told"), dir.path().join("v/n"));
        let script = format!(
            "#!/bin/sh\necho \"$@\" > {}\ntest ! -e {0}.no || {{ echo no helper >&2; exit 32; }}\n",
            told.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let source = NFSVolumeSource { server: "fd00::1".into(), path: "/x".into(), read_only: Some(true) };
        let options = ["nfsvers=4.2".to_owned()];
        let program = program.to_str().unwrap();
        mount_by(program, &target, &source, &options).await.unwrap();
        let want = format!("-t nfs -o nfsvers=4.2,ro [fd00::1]:/x {}\n", target.display());
        assert_eq!(fs::read_to_string(&told).unwrap(), want);
        assert!(target.is_dir());
        fs::write(dir.path().join("told.no"), "").unwrap();
        let plain = NFSVolumeSource { server: "10.0.0.1".into(), path: "/x".into(), read_only: None };
        let error = mount_by(program, &target, &plain, &[]).await.unwrap_err();
        let want = format!(
            "mount failed: exit status 32\nMounting command: mount\nMounting arguments: -t nfs 10.0.0.1:/x {}\nOutput: no \
             helper\n",
            target.display()
        );
        assert_eq!(error, want);
        assert!(
            mount_by("/nowhere/mount", &target, &plain, &[]).await.unwrap_err().starts_with("mount failed: /nowhere")
        );
    }
}
