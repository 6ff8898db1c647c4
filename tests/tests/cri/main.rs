//! Pods on a node without Kubernetes: what a kubelet asks of containerd, case by case, for each
//! handler of `stage`. runc is the reference: a case that it fails is a wrong case.
//!
//! Each case has a containerd of its own, which is up in a fraction of a second, and nothing may
//! be left on its node at the end (`Stage::play`). Names follow Kata's list of tests for
//! Kubernetes where that fits.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod assets;
mod blocks;
mod charged;
mod counters;
mod cpus;
mod held;
mod install;
mod kills;
mod lifecycle;
mod limits;
mod machines;
mod many;
mod node;
mod roots;
mod settings;
mod stage;
mod streams;
mod volumes;
mod why;

/// Each case for each handler.
macro_rules! cases {
    ($($file:ident::$case:ident,)*) => {
        mod runc {
            $(#[test]
            fn $case() {
                crate::stage::Stage::play(stringify!($case), &crate::stage::RUNC, crate::$file::$case);
            })*
        }

        mod pericarp {
            $(#[test]
            fn $case() {
                crate::stage::Stage::play(stringify!($case), &crate::stage::PERICARP, crate::$file::$case);
            })*
        }
    };
}

cases! {
    lifecycle::a_container_ends_with_its_code,
    lifecycle::a_command_that_is_not_there_is_an_error,
    lifecycle::containers_have_time_to_end_and_no_more,
    lifecycle::one_container_of_a_pod_is_started_again,
    lifecycle::what_is_removed_need_not_have_ended,
    lifecycle::a_pod_that_cannot_be_is_refused_with_the_reason,
    streams::a_command_has_its_own_output_and_code,
    streams::a_log_has_all_lines_in_their_order,
    streams::a_command_is_spoken_to,
    streams::a_terminal_has_its_size_and_one_output,
    settings::the_image_and_the_pod_say_how_a_container_is_run,
    settings::users_groups_and_capabilities,
    settings::a_root_may_be_read_only,
    settings::containers_of_a_pod_share_what_they_should,
    volumes::a_config_map_changes_under_the_container,
    volumes::containers_meet_in_a_volume,
    volumes::directories_and_single_files_are_mounted,
    blocks::a_block_volume_is_a_device,
    limits::limits_are_set_and_changed,
    limits::a_container_beyond_its_memory_is_killed_alone,
    limits::statistics_grow,
    many::pods_come_and_go_together,
    many::pods_one_after_the_other_leave_nothing,
    many::the_two_pods_of_the_article,
    node::what_a_pod_leaves_is_seen,
    node::containerd_is_killed_and_pods_go_on,
}

/// What only machines have.
macro_rules! machines {
    ($($file:ident::$case:ident,)*) => {
        $(#[test]
        fn $case() {
            stage::Stage::play(stringify!($case), &stage::PERICARP, $file::$case);
        })*
    };
}

machines! {
    machines::a_machine_has_the_size_of_its_limits,
    machines::what_is_the_hosts_is_refused_by_name,
    machines::other_names_of_the_handler_mean_it,
    machines::an_idle_pod_takes_little,
    charged::every_thread_and_byte_of_a_pod_is_charged_to_it,
    cpus::pods_stay_on_their_own_cpus,
    counters::what_a_pod_does_is_counted,
    counters::an_idle_pod_of_each_profile_is_measured,
    why::a_pod_is_verified_and_what_goes_wrong_in_it_is_said,
    why::what_ends_a_machine_is_said_after_it_has_gone,
    why::a_pod_that_the_host_has_no_memory_for_is_ended_and_it_is_said,
    assets::a_pod_keeps_its_guest_and_the_next_has_the_new_one,
    machines::a_guest_changes_nothing_above_what_it_is_shown,
    machines::a_killed_shim_takes_its_machine_along,
    machines::a_killed_file_server_ends_the_pod,
    machines::a_killed_vsock_ends_the_pod,
    machines::a_killed_machine_ends_the_pod,
    machines::a_guest_that_ends_nothing_is_ended,
    blocks::a_disk_comes_and_goes_with_its_containers,
    blocks::a_privileged_container_has_what_its_pod_names,
    blocks::a_block_server_is_started_again,
    blocks::a_direct_volume_is_mounted_in_the_guest,
    blocks::a_direct_volume_may_be_an_image_and_its_file_must_be_right,
    held::volumes_are_held_to_limits_of_their_own,
    roots::a_root_may_be_a_disk,
    kills::the_shim_is_killed_at_any_moment,
    kills::the_file_server_is_killed_at_any_moment,
    kills::the_network_card_is_killed_at_any_moment,
    kills::a_network_card_is_started_again,
    kills::the_vsock_is_killed_at_any_moment,
    kills::the_machine_is_killed_at_any_moment,
}
