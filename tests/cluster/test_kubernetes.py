"""launch/kubernetes: pods, jobs and claims against Kubernetes' own schemas, the rest by what a run needs."""

import re

import kubernetes_validate
import pytest
import yaml

from tests.cluster.lines import train_config
from tests.support.paths import ROOT

FOLDER = ROOT / "launch/kubernetes"
KUBERNETES = "1.34"


def read(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def pytorchjob_pods() -> list[dict]:
    return [replica["template"] for replica in read("pytorchjob")["spec"]["pytorchReplicaSpecs"].values()]


def jobset_pods() -> list[dict]:
    return [job["template"]["spec"]["template"] for job in read("jobset")["spec"]["replicatedJobs"]]


PODS = {"pytorchjob": pytorchjob_pods, "jobset": jobset_pods}


def container(pod: dict) -> dict:
    (found,) = pod["spec"]["containers"]
    return found


def option(line: list[str], name: str) -> str:
    (found,) = [
        word.partition("=")[2] for word in line[: line.index("launch/train.py")] if word.startswith(f"--{name}=")
    ]
    return found


def test_the_claim_follows_the_schema_and_is_what_the_pods_mount():
    claim = read("volumes")
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pods in PODS.values():
        for pod in pods():
            claims = [
                v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v
            ]
            assert claims == [claim["metadata"]["name"]]


@pytest.mark.parametrize("name", PODS)
def test_pods_follow_the_schema(name):
    for pod in PODS[name]():
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)
        whole["spec"] = whole["spec"] | {"restartPolice": "Never"}
        with pytest.raises(kubernetes_validate.ValidationError, match="restartPolice"):
            kubernetes_validate.validate(whole, KUBERNETES, strict=True)


def test_jobs_of_the_jobset_follow_the_schema():
    for job in read("jobset")["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **job["template"]}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", PODS)
def test_a_pod_trains(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for pod in PODS[name]():
        held = container(pod)
        config = train_config(held["command"])
        mounted = {mount["mountPath"]: mount["name"] for mount in held["volumeMounts"]}
        assert config.output_dir.startswith("/data/") and config.data_cache_dir.startswith("/data/")
        assert set(mounted.values()) == {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {"/data", "/dev/shm"} == set(mounted) and config.resume_from_checkpoint == "auto"
        assert held["resources"]["limits"]["nvidia.com/gpu"] == option(held["command"], "nproc_per_node")
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        shutdown = int(option(held["command"], "shutdown_timeout"))
        assert shutdown < pod["spec"]["terminationGracePeriodSeconds"]


def test_the_image_is_the_one_of_docker():
    user = re.search(r"^USER (\d+)$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    for pods in PODS.values():
        for pod in pods():
            assert pod["spec"]["securityContext"]["runAsUser"] == int(user[1])
            assert container(pod)["image"] == "diffdpo:gpu"


def test_the_pytorchjob_has_one_master_and_the_operator_s_rendezvous():
    job = read("pytorchjob")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    nodes = sum(replica["replicas"] for replica in replicas.values())
    for replica in replicas.values():
        held = container(replica["template"])
        assert held["name"] == "pytorch"  # the operator looks for this name
        assert replica["restartPolicy"] == "OnFailure" and "restartPolicy" not in replica["template"]["spec"]
        assert option(held["command"], "nnodes") == str(nodes)
        assert option(held["command"], "nproc_per_node") == job["spec"]["nprocPerNode"]
        for name, variable in (("node_rank", "RANK"), ("master_addr", "MASTER_ADDR"), ("master_port", "MASTER_PORT")):
            assert option(held["command"], name) == f"$({variable})"


def test_the_jobset_s_pods_find_its_first():
    jobset = read("jobset")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    assert job["replicas"] == 1 and inner["completionMode"] == "Indexed" and inner["backoffLimit"] == 0
    held = container(inner["template"])
    assert option(held["command"], "nnodes") == str(inner["completions"]) == str(inner["parallelism"])
    assert option(held["command"], "node_rank") == "$(JOB_COMPLETION_INDEX)"
    (first,) = [item["value"] for item in held["env"] if item["name"] == "MASTER_ADDR"]
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"] and inner["template"]["spec"]["restartPolicy"] == "Never"
    assert first == f"{jobset['metadata']['name']}-{job['name']}-0-0.{network['subdomain']}"
