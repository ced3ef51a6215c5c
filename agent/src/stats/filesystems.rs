//! The `container_fs_*` families: what groups read from and wrote to block devices, and the machine's file systems and disks.

use std::{collections::BTreeMap, fs};

use super::cadvisor::Group;
use crate::{node::info, server::exposition::Exposition, volumes::mounts::unescape};

/// Name, kind, help; values of a device come in this order.
type Family = (&'static str, &'static str, &'static str);

/// Of every group: from its cgroup, and for the machine from /proc/diskstats.
const MOVED: [Family; 4] = [
    ("container_fs_reads_bytes_total", "counter", "Cumulative count of bytes read"),
    ("container_fs_reads_total", "counter", "Cumulative count of reads completed"),
    ("container_fs_writes_bytes_total", "counter", "Cumulative count of bytes written"),
    ("container_fs_writes_total", "counter", "Cumulative count of writes completed"),
];

/// Of the machine's disks.
const DISKS: [Family; 9] = [
    ("container_fs_reads_merged_total", "counter", "Cumulative count of reads merged"),
    ("container_fs_sector_reads_total", "counter", "Cumulative count of sector reads completed"),
    ("container_fs_read_seconds_total", "counter", "Cumulative count of seconds spent reading"),
    ("container_fs_writes_merged_total", "counter", "Cumulative count of writes merged"),
    ("container_fs_sector_writes_total", "counter", "Cumulative count of sector writes completed"),
    ("container_fs_write_seconds_total", "counter", "Cumulative count of seconds spent writing"),
    ("container_fs_io_current", "gauge", "Number of I/Os currently in progress"),
    ("container_fs_io_time_seconds_total", "counter", "Cumulative count of seconds spent doing I/Os"),
    ("container_fs_io_time_weighted_seconds_total", "counter", "Cumulative weighted I/O time in seconds"),
];

/// Of the machine's file systems.
const SPACE: [Family; 4] = [
    ("container_fs_limit_bytes", "gauge", "Number of bytes that can be consumed by the container on this filesystem."),
    ("container_fs_usage_bytes", "gauge", "Number of bytes that are consumed by the container on this filesystem."),
    ("container_fs_inodes_total", "gauge", "Number of Inodes"),
    ("container_fs_inodes_free", "gauge", "Number of available Inodes"),
];

/// Numbers by device.
type Devices<const N: usize> = BTreeMap<String, [f64; N]>;

/// All of them. The first group is the machine.
pub(super) fn write(groups: &[Group], e: &mut Exposition) {
    let (moved, disks) = disks(&fs::read_to_string("/proc/diskstats").unwrap_or_default());
    let mut all: Vec<Devices<4>> = groups.iter().map(|g| g.moved.clone()).collect();
    if let Some(machine) = all.first_mut() {
        *machine = moved;
    }
    families(&MOVED, groups, &all, e);
    let machine = &groups[..groups.len().min(1)];
    families(&DISKS, machine, &[disks], e);
    families(&SPACE, machine, &[space(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())], e);
}

fn families<const N: usize>(names: &[Family; N], groups: &[Group], all: &[Devices<N>], e: &mut Exposition) {
    for (column, (name, kind, help)) in names.iter().enumerate() {
        e.begin(name, kind, help);
        for (g, devices) in groups.iter().zip(all) {
            for (device, numbers) in devices {
                let labels = g.labels.iter().map(|(k, v)| (*k, v.as_str()));
                let mut labels: Vec<(&str, &str)> = labels.collect();
                labels.insert(1, ("device", device));
                e.sample(name, &labels, Some(numbers[column]));
            }
        }
    }
}

/// /proc/diskstats: what was moved, and the rest. Devices that never did anything are left out.
fn disks(text: &str) -> (Devices<4>, Devices<9>) {
    let (mut moved, mut rest) = (Devices::new(), Devices::new());
    for line in text.lines() {
        let mut words = line.split_whitespace().skip(2);
        let Some(name) = words.next() else { continue };
        let n: Vec<f64> = words.filter_map(|w| w.parse().ok()).collect();
        // https://docs.kernel.org/admin-guide/iostats.html
        let &[
            reads,
            reads_merged,
            sectors_read,
            read_ms,
            writes,
            writes_merged,
            sectors_written,
            write_ms,
            now,
            ms,
            weighted,
            ..,
        ] = n.as_slice()
        else {
            continue;
        };
        if reads + writes == 0.0 {
            continue;
        }
        let device = format!("/dev/{name}");
        moved.insert(device.clone(), [sectors_read * 512.0, reads, sectors_written * 512.0, writes]);
        let seconds = |ms: f64| ms / 1000.0;
        rest.insert(
            device,
            [
                reads_merged,
                sectors_read,
                seconds(read_ms),
                writes_merged,
                sectors_written,
                seconds(write_ms),
                now,
                seconds(ms),
                seconds(weighted),
            ],
        );
    }
    (moved, rest)
}

/// Each mounted block device once, by where it is mounted first.
fn space(mountinfo: &str) -> Devices<4> {
    let mut all = Devices::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (Some(place), Some(device)) = (left.split(' ').nth(4), right.split(' ').nth(1)) else { continue };
        if !device.starts_with("/dev/") || all.contains_key(device) {
            continue;
        }
        if let Some((size, free, inodes, inodes_free)) = info::disk(unescape(place).as_ref()) {
            let numbers = [size, size.saturating_sub(free), inodes, inodes_free];
            all.insert(device.to_owned(), numbers.map(|n| n as f64));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_work_are_told() {
        let text =
            " 254 0 vda 10 1 80 2000 20 2 160 4000 3 5000 6000 0 0 0 0\n 253 0 zram0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n";
        let (moved, rest) = disks(text);
        assert_eq!(moved, [("/dev/vda".to_owned(), [40960.0, 10.0, 81920.0, 20.0])].into());
        assert_eq!(rest["/dev/vda"], [1.0, 80.0, 2.0, 2.0, 160.0, 4.0, 3.0, 5.0, 6.0]);
        assert_eq!(rest.len(), 1);
    }

    #[test]
    fn a_device_is_told_once() {
        let text = "27 1 254:0 / / rw - ext4 /dev/vda rw\n28 27 254:0 / /tmp rw - ext4 /dev/vda rw\n29 1 0:3 / /proc rw - proc proc rw\n";
        let all = space(text);
        assert_eq!(all.keys().collect::<Vec<_>>(), ["/dev/vda"]);
        assert!(all["/dev/vda"][0] > 0.0);
    }
}
