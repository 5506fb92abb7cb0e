# Jobs outlive a killed snakemake, and two snakemakes may ask for the same artefact. So a job has
# the lease of its artefact before snakemake deletes what lies there to make it anew, and leaves
# alone what another job made after the snakemake that submitted this one had begun.
import atexit
import signal


onstart:
    if workflow.local_exec:
        forks.begin()
    else:
        new_controller(RESULTS / ".work" / "controllers")


def asked_for():
    """Return the unit that this process was started for on a compute node, None elsewhere."""
    words = sys.argv
    # slurm-jobstep only starts the process that does the work.
    if not workflow.remote_exec or "slurm-jobstep" in words or "--target-jobs" not in words:
        return None
    job = words[words.index("--target-jobs") + 1]
    found = re.fullmatch(r"(\w+):(?:.*,)?id=(\w+)(?:,.*)?", job)
    return PLAN.units.get(found.groups()) if found else None


if workflow.remote_exec:
    # Meant for the training below, it would end this process.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

if ASKED := asked_for():
    CLAIM = take(lease_folder(ASKED.stage, ASKED.folder))
    atexit.register(CLAIM.release)

    def stamp():
        made_from = {name: one.main for name, one in ASKED.inputs.items()}
        return stamp_of(ASKED.stage, ASKED.spec, made_from)

    if CLAIM.finished_meanwhile(ASKED.folder, stamp):
        print(f"{ASKED.folder}: another job made it meanwhile: nothing to do")
        sys.exit(0)
